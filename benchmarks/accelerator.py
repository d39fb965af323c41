"""Everything that is to be known of an accelerator, in one command that ends within nine minutes.

    python -m quire.benchmarks.accelerator --backend cuda --out record.json

The ceilings of the device first, then each kernel as a fraction of them, then the whole engine
beside transformers' `generate` with the same random weights, then the conformance suite. What no
longer fits into the time is left out and named. `--dry-run` walks the same way on tiny shapes in
Triton's interpreter (TRITON_INTERPRET=1): its figures mean nothing.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import numpy as np
import typer

from quire.backends.torch_accelerator.queue import StreamEvent
from quire.benchmarks import workloads
from quire.benchmarks.accelerator_attention import measure_attention
from quire.benchmarks.accelerator_kernels import (
    DRY,
    FULL,
    Ceiling,
    measure_ceiling,
    measure_kernels,
)
from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.shapes import SHAPES, make_model
from quire.benchmarks.transformers_batching import even, run_batched
from quire.benchmarks.workloads import Work
from quire.core.discovery import load_backend

if TYPE_CHECKING:
    from quire import LLM

_BUDGET_S = 9 * 60
_ENGINE_S = {"llama-tiny": 0, "llama-1b": 90, "llama-8b": 180}
"""What an engine's part may need: it is left out where less is left."""
_SUITE_S = 120
_FULL_SUITE_S = 240
_EVEN_TOKENS = 128
"""Of each output where a peer wants all outputs of one length."""
_PEERS = 4
"""Requests of a load that `generate` runs, one at a time."""


def main(
    backend: Annotated[str, typer.Option(help="as in `quire backends`")] = "cuda",
    dry_run: Annotated[bool, typer.Option(help="tiny shapes; figures mean nothing")] = False,
    budget_s: Annotated[int, typer.Option(help="seconds for everything")] = _BUDGET_S,
    folder: Annotated[Path | None, typer.Option(help="where models are kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measures, prints a table and writes JSON."""
    deadline = time.monotonic() + budget_s
    device = load_backend(backend).open(0)
    record = Record(
        name=f"accelerator_{backend}" + ("_dry" if dry_run else ""),
        settings={"device": device.info.name, "architecture": device.info.architecture},
        facts={"details": dict(device.info.details), "left_out": []},
    )
    sizes = DRY if dry_run else FULL
    ceiling, measured = measure_ceiling(device, sizes)
    record.measurements += measured
    record.measurements += measure_kernels(device, sizes, ceiling)
    attention, missing = measure_attention(backend, device, sizes, ceiling, is_dry=dry_run)
    record.measurements += attention
    record.facts["not_measured"] = missing
    device.close()
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    for shape in ("llama-tiny",) if dry_run else ("llama-1b", "llama-8b"):
        if deadline - time.monotonic() < _ENGINE_S[shape]:
            record.facts["left_out"].append(f"engine {shape}")
        else:
            _measure_engine(backend, shape, home, ceiling, record, is_dry=dry_run)
    _certify(backend, deadline - time.monotonic(), record, is_dry=dry_run)
    record.show()
    print(f"written to {record.write(out)}")


def _measure_engine(
    backend: str, shape: str, home: Path, ceiling: Ceiling, record: Record, *, is_dry: bool
) -> None:
    """A decode step against its floor, and output tokens per second: ours and transformers'."""
    directory = make_model(shape, home, dtype="bfloat16")
    works = _load(shape, is_dry=is_dry)
    llm = _start_quire(directory, backend, is_dry=is_dry)
    _run_quire(llm, works[:1])
    ours = _measurement(shape, "quire", works, _run_quire(llm, works), "")
    evened = even(works, 2 if is_dry else _EVEN_TOKENS)
    ours_even = _measurement(shape, "quire", evened, _run_quire(llm, evened), "", load="even load")
    record.measurements += [
        _decode_step(llm, shape, batch, ceiling, is_dry=is_dry)
        for batch in ((1, 2) if is_dry else (1, 8, 64))
    ]
    record.measurements += [
        _host_step(llm, shape, batch, is_dry=is_dry) for batch in ((1, 2) if is_dry else (1, 64))
    ]
    llm.close()
    del llm
    gc.collect()
    sample = workloads.sample_of(works, min(_PEERS, len(works)))
    seconds = _run_transformers(directory, _torch_device(backend), sample)
    note = f"generate, one at a time, {len(sample)} of the requests"
    theirs = _measurement(shape, "transformers", sample, seconds, note)
    record.measurements += [ours, theirs]
    record.ratios.append(paired_ratio(f"mixed load, {shape}", ours, theirs))
    try:
        seconds = _run_continuous(directory, _torch_device(backend), evened)
    # It needs kernels that not every device has.
    except Exception as error:
        why = f"continuous batching of transformers: {type(error).__name__}: {error}"
        record.facts["not_measured"].append(why[:300])
        return
    batched = _measurement(shape, "transformers batched", evened, seconds, "", load="even load")
    record.measurements += [ours_even, batched]
    record.ratios.append(paired_ratio(f"even load, {shape}", ours_even, batched))


def _decode_step(
    llm: LLM, shape: str, batch: int, ceiling: Ceiling, *, is_dry: bool
) -> Measurement:
    """Seconds of a step over those that its weights and cached keys take to be read.

    The difference of a long and a short output, so that prompts and starts cancel out.
    """
    prompt, short, long = (4, 1, 3) if is_dry else (512, 8, 72)
    statistics = llm.statistics()
    token_bytes = statistics.memory_bytes["cache"] / llm.facts.num_cache_tokens
    context = prompt + (short + long) / 2
    floor_s = (llm.facts.weight_bytes + batch * context * token_bytes) / ceiling.bytes_per_s
    prompts = [[10 + number, *range(20, 19 + prompt)] for number in range(batch)]
    values = []
    for _ in range(1 if is_dry else 3):
        taken = [_run_quire(llm, [Work(p, n) for p in prompts]) for n in (short, long)]
        values.append((taken[1] - taken[0]) / (long - short) / floor_s)
    return Measurement(
        work=f"decode step, {shape}, {batch} requests",
        subject="quire",
        unit="times weights and cache over copy bandwidth",
        values=tuple(values),
    )


def _host_step(llm: LLM, shape: str, batch: int, *, is_dry: bool) -> Measurement:
    """What the host itself does for a decode step: all of its time but the waiting for the device.

    The difference of a long and a short output, as for a step's own time.
    """
    prompt, short, long = (4, 1, 3) if is_dry else (32, 8, 136)
    prompts = [[10 + number, *range(20, 19 + prompt)] for number in range(batch)]
    values = []
    for _ in range(1 if is_dry else 3):
        taken = []
        for num_tokens in (short, long):
            with _timed_waiting() as waited:
                seconds = _run_quire(llm, [Work(p, num_tokens) for p in prompts])
            taken.append(seconds - sum(waited))
        values.append(1e3 * (taken[1] - taken[0]) / (long - short))
    return Measurement(
        work=f"host's part of a decode step, {shape}, {batch} requests",
        subject="quire",
        unit="ms",
        values=tuple(values),
    )


@contextmanager
def _timed_waiting() -> Iterator[list[float]]:
    """Seconds of each wait for an event of a stream, while it lasts."""
    waited: list[float] = []
    wait = StreamEvent.wait

    def timed(event: StreamEvent) -> None:
        begin = time.perf_counter()
        try:
            wait(event)
        finally:
            waited.append(time.perf_counter() - begin)

    with patch.object(StreamEvent, "wait", timed):
        yield waited


def _load(shape: str, *, is_dry: bool) -> list[Work]:
    if is_dry:
        return [Work(list(range(10, 14)), 2), Work(list(range(20, 23)), 2)]
    return workloads.mixed(np.random.default_rng(1000), SHAPES[shape]["vocab_size"])


def _measurement(
    shape: str,
    subject: str,
    works: list[Work],
    seconds: float,
    note: str,
    *,
    load: str = "mixed load",
) -> Measurement:
    rate = sum(work.num_tokens for work in works) / seconds
    return Measurement(
        work=f"{load}, {shape}",
        subject=subject,
        unit="output tokens/s",
        values=(rate,),
        note=note,
    )


def _start_quire(directory: Path, backend: str, *, is_dry: bool) -> LLM:
    from quire import LLM

    llm = LLM(
        model=str(directory),
        device=backend,
        dtype="bfloat16",
        max_model_len=64 if is_dry else 8192,
        max_num_seqs=2 if is_dry else 64,
        max_num_batched_tokens=32 if is_dry else 8192,
        cache_memory_bytes=(1 << 20) if is_dry else (16 << 30),
    )
    llm.warm_up()
    return llm


def _run_quire(llm: LLM, works: list[Work]) -> float:
    from quire import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=w.num_tokens, ignore_eos=True, detokenize=False)
        for w in works
    ]
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": w.prompt} for w in works], params, use_tqdm=False)
    return time.perf_counter() - begin


def _torch_device(backend: str) -> str:
    device = load_backend(backend).open(0)
    return str(device.torch_device)


def _run_transformers(directory: Path, where: str, works: list[Work]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model = model.to(where).eval()

    def generate(work: Work) -> None:
        ids = torch.tensor([work.prompt], device=where)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=work.num_tokens,
            min_new_tokens=work.num_tokens,
            do_sample=False,
        ).cpu()

    with torch.inference_mode():
        generate(works[0])
        begin = time.perf_counter()
        for work in works:
            generate(work)
        return time.perf_counter() - begin


def _run_continuous(directory: Path, where: str, works: list[Work]) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return run_batched(model.to(where).eval(), works)


def _certify(backend: str, left_s: float, record: Record, *, is_dry: bool) -> None:
    """The conformance suite as far as the time goes; booting alone in a dry run."""
    if left_s < _SUITE_S and not is_dry:
        record.facts["left_out"].append("conformance")
        return
    from quire.conformance.run import run_suite

    level = 0 if is_dry else 2 if left_s > _FULL_SUITE_S else 1
    report = run_suite(backend, level=level, workers=1 if is_dry else 4, is_quiet=True)
    record.facts["conformance"] = {"level": report.level, **report.counts}


if __name__ == "__main__":
    typer.run(main)
