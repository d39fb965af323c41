"""The CPU's paged attention against torch's attention on dense tensors, at each ISA level.

python -m quire.benchmarks.paged_attention_cpu

torch gets keys and values that lie dense already, which is more than an engine with a paged cache
could give it. Times are processor time, best of a round, so that neighbours disturb less; each
round measures every subject once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from quire import kernels_cpu
from quire.benchmarks.recording import Measurement, Ratio, Record

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One batch: requests with a context, of which some tokens are new."""

    name: str
    num_requests: int
    context: int
    num_new: int
    calls: int
    """Calls in one measurement."""
    num_heads: int = 14
    num_kv_heads: int = 2
    head_size: int = 64


WORKS = (
    Work(name="decode, 32 x 300", num_requests=32, context=300, num_new=1, calls=20),
    Work(name="decode, 1 x 8192", num_requests=1, context=8192, num_new=1, calls=20),
    Work(name="prefill, 2048", num_requests=1, context=2048, num_new=2048, calls=1),
)


def main(
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option(help="of torch and of the kernels")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints milliseconds a call and the ratios."""
    torch.set_num_threads(threads)
    settings = {"rounds": rounds, "threads": threads, "dtype": dtype, "block_size": BLOCK_SIZE}
    record = Record(name=f"paged_attention_cpu_{dtype}", settings=settings)
    for work in WORKS:
        _measure(work, getattr(torch, dtype), rounds, record)
    record.show()
    print(f"written to {record.write(out)}")


def _measure(work: Work, dtype: torch.dtype, rounds: int, record: Record) -> None:
    """Adds the figures of one batch to the record."""
    q = torch.randn(work.num_requests * work.num_new, work.num_heads, work.head_size).to(dtype)
    subjects: dict[str, Callable[[], object]] = {"torch": _dense_attention(work, q)}
    for isa in kernels_cpu.available_isas():
        subjects[f"quire {isa}"] = _paged_attention(work, q, isa)
    figures: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, call in subjects.items():
            figures[name].append(_milliseconds(call, work.calls))
    for name, values in figures.items():
        subject = Measurement(work=work.name, subject=name, unit="ms a call", values=tuple(values))
        record.measurements.append(subject)
    for name in list(subjects)[1:]:
        ratios = [slow / fast for slow, fast in zip(figures["torch"], figures[name], strict=True)]
        ratio = Ratio(work=work.name, better=name, worse="torch", values=tuple(ratios))
        record.ratios.append(ratio)


def _paged_attention(work: Work, q: torch.Tensor, isa: str) -> Callable[[], None]:
    blocks_each = -(-work.context // BLOCK_SIZE)
    num_blocks = blocks_each * work.num_requests
    shape = (num_blocks, BLOCK_SIZE, work.num_kv_heads, work.head_size)
    k, v = torch.randn(shape).to(q.dtype), torch.randn(shape).to(q.dtype)
    table = torch.randperm(num_blocks).view(work.num_requests, blocks_each).int()
    seq_lens = torch.full((work.num_requests,), work.context, dtype=torch.int32)
    starts = torch.arange(0, q.shape[0] + 1, work.num_new, dtype=torch.int32)
    scale, out = work.head_size**-0.5, torch.empty_like(q)

    def call() -> None:
        kernels_cpu.use_isa(isa)
        kernels_cpu.paged_attention(q, k, v, table, seq_lens, starts, scale, 0, 0.0, out)

    return call


def _dense_attention(work: Work, q: torch.Tensor) -> Callable[[], object]:
    shape = (work.num_requests, work.num_kv_heads, work.context, work.head_size)
    k, v = torch.randn(shape).to(q.dtype), torch.randn(shape).to(q.dtype)
    heads = q.view(work.num_requests, work.num_new, work.num_heads, work.head_size).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(heads, k, v, is_causal=work.num_new > 1, enable_gqa=True)


def _milliseconds(call: Callable[[], object], calls: int) -> float:
    """The best of three, after one call that warms up."""
    call()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, time.process_time() - start)
    return 1000.0 * best / calls


if __name__ == "__main__":
    typer.run(main)
