"""The CPU's kernels beside linear layers against the reference, and what one call costs.

python -m quire.benchmarks.cpu_kernels

Subjects take turns within one run, in processor time, the best of three in each round, so that
neighbours disturb less. Where memory bounds a kernel the bytes that it must read are named, and
beside them the rate at which this machine reads memory in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu.ops import CpuOps
from quire.backends.reference import ReferenceOps
from quire.benchmarks.recording import Measurement, Ratio, Record
from quire.core.interface import ExpertWeights, Ops, RoutingSpec, SamplingTensors, Sequences

_VOCAB_SIZE = 151936


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One operator with its arguments, made for either side."""

    name: str
    make: Callable[[Ops], Callable[[], object]]
    calls: int
    """Calls in one measurement."""
    read_bytes: int = 0
    """What must come from memory; 0: memory does not bound it."""


def main(
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option(help="of torch and of the kernels")] = 1,
    only: Annotated[str, typer.Option(help="works whose name contains this")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints microseconds a call, ratios, and GB/s where memory bounds."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = {"rounds": rounds, "threads": threads, "isa": kernels_cpu.isa()}
    record = Record(name=f"cpu_kernels_{kernels_cpu.isa()}", settings=settings)
    memory = torch.ones(32 << 20)
    with torch.inference_mode():
        for work in _works():
            if only in work.name:
                _measure(work, rounds, memory, record)
    record.show()
    print(f"written to {record.write(out)}")


def _measure(work: Work, rounds: int, memory: Tensor, record: Record) -> None:
    ours, reference = work.make(CpuOps()), work.make(ReferenceOps())
    figures: dict[str, list[float]] = {"quire": [], "reference": []}
    floors = []
    for _ in range(rounds):
        figures["quire"].append(_microseconds(ours, work.calls))
        figures["reference"].append(_microseconds(reference, max(1, work.calls // 10)))
        if work.read_bytes:
            floors.append(memory.nbytes / 1e3 / _microseconds(memory.sum, 1))
    for name, values in figures.items():
        record.measurements.append(_measurement(work, name, "us a call", values))
    if work.read_bytes:
        rates = [work.read_bytes / 1e3 / us for us in figures["quire"]]
        record.measurements.append(_measurement(work, "quire", "GB/s", rates))
        record.measurements.append(_measurement(work, "reading memory", "GB/s", floors))
    ratios = [b / a for a, b in zip(figures["quire"], figures["reference"], strict=True)]
    record.ratios.append(
        Ratio(work=work.name, better="quire", worse="reference", values=tuple(ratios))
    )


def _measurement(work: Work, subject: str, unit: str, values: list[float]) -> Measurement:
    return Measurement(work=work.name, subject=subject, unit=unit, values=tuple(values))


def _microseconds(call: Callable[[], object], calls: int) -> float:
    """The best of three, after one call that warms up."""
    call()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, time.process_time() - start)
    return 1e6 * best / calls


# --- works ----------------------------------------------------------------------------------------


def _works() -> Iterator[Work]:
    yield from _expert_works()
    yield from _recurrent_works()
    yield from _vocabulary_works()
    yield Work(name="call of rms_norm, 1 x 64", make=_small_norm, calls=2000)
    yield Work(name="call of gated_activation, 1 x 64", make=_small_gate, calls=2000)


def _expert_works() -> Iterator[Work]:
    count, hidden, inner, chosen = 32, 1024, 512, 4
    weights = ExpertWeights(
        gate_up=torch.randn(count, 2 * inner, hidden).bfloat16() * 0.03,
        down=torch.randn(count, hidden, inner).bfloat16() * 0.03,
    )
    spec = RoutingSpec(num_experts=count, num_chosen=chosen)
    for tokens, calls in ((1, 40), (32, 6), (256, 2)):
        logits = torch.randn(8, tokens, count)
        x = torch.randn(tokens, hidden).bfloat16()

        def make(ops: Ops, x: Tensor = x, logits: Tensor = logits) -> Callable[[], object]:
            packed = ops.pack_experts(weights)
            steps = iter(range(1 << 62))

            def call() -> Tensor:  # other experts each time, so that weights come from memory
                shares, ids = ops.route_experts(logits[next(steps) % 8], spec, None)
                return ops.experts(x, packed, shares, ids)

            return call

        size = chosen * 3 * inner * hidden * 2 if tokens == 1 else 0
        yield Work(
            name=f"experts bfloat16, {tokens} tokens", make=make, calls=calls, read_bytes=size
        )


def _sequences(count: int, length: int) -> Sequences:
    starts = list(range(0, count * length + 1, length))
    return Sequences(starts=torch.tensor(starts, dtype=torch.int32), starts_host=starts)


def _recurrent_works() -> Iterator[Work]:
    for name, count, length, calls in (
        ("decode, 8 x 1", 8, 1, 40),
        ("prefill, 1 x 256", 1, 256, 4),
    ):
        where, total = _sequences(count, length), count * length
        heads, size = 8, 128
        x, b, c = torch.randn(total, heads, 64), *torch.randn(2, total, 1, size)
        dt, a = torch.rand(total, heads), -torch.rand(heads)
        states = torch.zeros(count, heads, 64, size)
        yield Work(
            name=f"ssd_scan, {name}",
            make=lambda ops, s=states, w=where, t=(x, dt, a, b, c): (
                lambda: ops.ssd_scan(*t, None, s, w)
            ),
            calls=calls,
        )
        q, k = torch.nn.functional.normalize(torch.randn(2, total, heads, size), dim=-1)
        v, beta = torch.randn(total, heads, size), torch.rand(total, heads)
        delta_states = torch.zeros(count, heads, size, size)
        yield Work(
            name=f"gated_delta_rule, {name}",
            make=lambda ops, s=delta_states, w=where, t=(q, k, v, -dt, beta): (
                lambda: ops.gated_delta_rule(*t, s, w)
            ),
            calls=calls,
        )
        channels = 2048
        rows, weight = torch.randn(total, channels), torch.randn(channels, 4)
        conv_states = torch.zeros(count, channels, 3)
        yield Work(
            name=f"causal_conv1d, {name}",
            make=lambda ops, s=conv_states, w=where, t=(rows, weight): (
                lambda: ops.causal_conv1d(*t, None, s, w, activation="silu")
            ),
            calls=calls,
        )
        rates = -torch.rand(channels, 16)
        steps, pair = torch.rand(total, channels), torch.randn(2, total, 16)
        scan_states = torch.zeros(count, channels, 16)
        yield Work(
            name=f"selective_scan, {name}",
            make=lambda ops, s=scan_states, w=where, t=(rows, steps, rates, *pair): (
                lambda: ops.selective_scan(*t, None, s, w)
            ),
            calls=calls,
        )


def _vocabulary_works() -> Iterator[Work]:
    rows = 4
    peaked = torch.randn(rows, _VOCAB_SIZE) * 3
    flat = torch.randn(rows, _VOCAB_SIZE) * 0.1
    for name, logits, top_k, top_p in (
        ("greedy", peaked, 0, 1.0),
        ("temperature alone", peaked, _VOCAB_SIZE, 1.0),
        ("top-k 50", peaked, 50, 1.0),
        ("top-p 0.9", peaked, _VOCAB_SIZE, 0.9),
        ("top-p 0.9, flat", flat, _VOCAB_SIZE, 0.9),
    ):
        chosen = SamplingTensors(
            temperature=torch.full((rows,), float(top_k > 0)),
            top_k=torch.full((rows,), top_k),
            top_p=torch.full((rows,), top_p),
            min_p=torch.zeros(rows),
            uniform=torch.rand(rows),
            is_all_greedy=top_k == 0,
            needs_filter=top_k < _VOCAB_SIZE or top_p < 1,
        )
        yield Work(
            name=f"sample {rows} rows, {name}",
            make=lambda ops, x=logits, s=chosen: lambda: ops.sample(x, s),
            calls=10,
        )
    ids = torch.arange(rows)
    yield Work(
        name=f"logprobs {rows} rows, best 20",
        make=lambda ops: lambda: ops.logprobs(peaked, ids, 20),
        calls=10,
    )


def _small_norm(ops: Ops) -> Callable[[], object]:
    x, weight = torch.randn(1, 64), torch.randn(64)
    return lambda: ops.rms_norm(x, weight, 1e-6)


def _small_gate(ops: Ops) -> Callable[[], object]:
    x = torch.randn(1, 128)
    return lambda: ops.gated_activation(x, "silu")


if __name__ == "__main__":
    typer.run(main)
