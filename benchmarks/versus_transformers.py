"""Quire and transformers on the same random-weight model, interleaved in one run.

    python benchmarks/versus_transformers.py --dtype bfloat16 --rounds 3

transformers runs one request at a time with `generate`; of the long loads it runs a sample, since
its rate does not depend on how many there are. Each round draws new prompts of the same lengths, so
that no cache outlives a round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from quire.benchmarks import workloads
from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.shapes import SHAPES, make_model
from quire.benchmarks.transformers_batching import even, run_batched
from quire.benchmarks.workloads import Work

if TYPE_CHECKING:
    from quire import LLM


@dataclass(frozen=True, slots=True)
class Load:
    """One row of the table."""

    name: str
    make: Callable[[np.random.Generator, int], list[Work]]
    sample: int
    """How many of its requests transformers runs."""
    counts_prompt: bool = False
    """Whether the rate is of prompt tokens, not of output tokens."""


LOADS = (
    Load("one stream", workloads.single_stream, 1),
    Load("mixed load of 32", workloads.mixed, 6),
    Load("prefill of 2048", workloads.long_prefill, 1, counts_prompt=True),
    Load("shared prefix of 512, 32 requests", workloads.shared_prefix, 4),
)
EVEN_LOAD = "mixed prompts, 64 tokens each"
_EVEN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one subject did with one load."""

    seconds: float
    tokens: list[list[int]]


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, for both")] = "bfloat16",
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen2-0.5b",
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 3,
    threads: Annotated[int, typer.Option(help="threads of torch, for both; 0: its own choice")] = 0,
    quantization: Annotated[
        str, typer.Option(help="int8 or int4: Quire quantizes at load, transformers does not")
    ] = "",
    batched: Annotated[
        int, typer.Option(help="rounds of a load of 32 beside transformers' continuous batching")
    ] = 1,
    only: Annotated[str, typer.Option(help="run loads whose name contains this")] = "",
    folder: Annotated[Path | None, typer.Option(help="where the model is kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measures both and prints the ratio."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    directory = make_model(shape, home, dtype=dtype)
    loads = [load for load in LOADS if only in load.name]
    record = Record(
        name=f"versus_transformers_{shape}_{quantization or dtype}",
        settings={
            "shape": shape,
            "dtype": dtype,
            "quantization": quantization or None,
            "rounds": rounds,
            "threads": torch.get_num_threads(),
        },
    )
    llm, peer = (
        _start_quire(directory, dtype, quantization or None),
        _start_transformers(directory, dtype),
    )
    vocab_size = SHAPES[shape]["vocab_size"]
    warm_up = [Work(list(range(20, 40)), 4)]
    _run_quire(llm, warm_up)
    _run_transformers(peer, warm_up)
    for load in loads:
        _measure(load, llm, peer, vocab_size, rounds, record)
    if batched and only in EVEN_LOAD:
        _measure_batched(llm, peer, vocab_size, batched, record)
    record.show()
    print(f"written to {record.write(out)}")
    llm.close()


def _measure(load: Load, llm: LLM, peer: Any, vocab_size: int, rounds: int, record: Record) -> None:
    """One load, `rounds` times, the two in turn; adds the figures to `record`."""
    ours, theirs, agreement = [], [], []
    for number in range(rounds):
        works = load.make(np.random.default_rng(1000 + number), vocab_size)
        sample = workloads.sample_of(works, load.sample)
        quire = _run_quire(llm, works)
        transformers = _run_transformers(peer, sample)
        ours.append(_rate(load, works, quire.seconds))
        theirs.append(_rate(load, sample, transformers.seconds))
        chosen = [quire.tokens[works.index(work)] for work in sample]
        agreement.append(_agreement(chosen, transformers.tokens))
    unit = "prompt tokens/s" if load.counts_prompt else "output tokens/s"
    note = f"first differing token after {np.mean(agreement):.0%} of the output, mean"
    a = Measurement(work=load.name, subject="quire", unit=unit, values=tuple(ours), note=note)
    b = Measurement(
        work=load.name,
        subject="transformers",
        unit=unit,
        values=tuple(theirs),
        note=f"generate, one at a time, {load.sample} of the requests",
    )
    record.measurements += [a, b]
    record.ratios.append(paired_ratio(load.name, a, b))


def _measure_batched(llm: LLM, peer: Any, vocab_size: int, rounds: int, record: Record) -> None:
    """The mixed prompts with outputs of one length, beside transformers' continuous batching."""
    ours, theirs = [], []
    for number in range(rounds):
        prompts = workloads.mixed(np.random.default_rng(2000 + number), vocab_size)
        works = even(prompts, _EVEN_TOKENS)
        num_tokens = sum(work.num_tokens for work in works)
        ours.append(num_tokens / _run_quire(llm, works).seconds)
        theirs.append(num_tokens / run_batched(peer, works))
    a, b = (
        Measurement(work=EVEN_LOAD, subject=name, unit="output tokens/s", values=tuple(values))
        for name, values in (("quire", ours), ("transformers, continuous batching", theirs))
    )
    record.measurements += [a, b]
    record.ratios.append(paired_ratio(EVEN_LOAD, a, b))


def _rate(load: Load, works: list[Work], seconds: float) -> float:
    count = sum(len(w.prompt) if load.counts_prompt else w.num_tokens for w in works)
    return count / seconds


def _start_quire(directory: Path, dtype: str, quantization: str | None) -> LLM:
    from quire import LLM

    return LLM(
        model=str(directory),
        dtype=dtype,
        quantization=quantization,
        max_model_len=4096,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        cache_memory_bytes=2 << 30,
    )


def _start_transformers(directory: Path, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def _run_quire(llm: LLM, works: list[Work]) -> Outcome:
    from quire import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=w.num_tokens, ignore_eos=True, detokenize=False)
        for w in works
    ]
    prompts = [{"prompt_token_ids": work.prompt} for work in works]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return Outcome(seconds, [list(output.outputs[0].token_ids) for output in outputs])


def _run_transformers(model: Any, works: list[Work]) -> Outcome:
    import torch

    tokens = []
    start = time.perf_counter()
    with torch.inference_mode():
        for work in works:
            ids = torch.tensor([work.prompt])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=work.num_tokens,
                min_new_tokens=work.num_tokens,
                do_sample=False,
            )
            tokens.append(out[0, len(work.prompt) :].tolist())
    return Outcome(time.perf_counter() - start, tokens)


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The mean share of the output before the first token that differs."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(b))
        shares.append(same / len(b))
    return float(np.mean(shares))


if __name__ == "__main__":
    typer.run(main)
