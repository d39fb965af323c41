"""What transformers' own code costs beside a native family: the same model run both ways.

python benchmarks/adapter.py --shape qwen2-0.5b
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.shapes import SHAPES, write_config

WAYS = {"native": "native", "transformers": "transformers (paged)"}


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen2-0.5b",
    device: Annotated[str, typer.Option()] = "cpu",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    running: Annotated[int, typer.Option(help="requests that run at once")] = 8,
    prompt: Annotated[int, typer.Option(help="tokens of each prompt")] = 128,
    tokens: Annotated[int, typer.Option(help="output tokens of each")] = 32,
    rounds: Annotated[int, typer.Option()] = 3,
    threads: Annotated[int | None, typer.Option(help="of the host; none: the backend's")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Runs waves of requests through both and prints output tokens/s and their ratio."""
    record = Record(
        name=f"adapter_{shape}_{device}_{dtype}",
        settings={
            "shape": shape, "device": device, "dtype": dtype, "running": running,
            "prompt": prompt, "tokens": tokens, "rounds": rounds, "threads": threads,
        },
    )  # fmt: skip
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape)
        llms = {way: _start(folder, way, device, dtype, running, threads) for way in WAYS}
        # In turns, so that whatever else the machine does meets both.
        for round_number in range(rounds + 1):
            for way, llm in llms.items():
                rates[way].append(_wave(llm, running, prompt, tokens, round_number))
        for llm in llms.values():
            llm.close()  # type: ignore[attr-defined]
    for way, subject in WAYS.items():
        record.measurements.append(
            Measurement(
                work=f"{running} requests, {prompt} + {tokens} tokens",
                subject=subject,
                unit="output tokens/s",
                values=tuple(rates[way][1:]),  # the first warms up
            )
        )
    pairs = zip(rates["transformers"][1:], rates["native"][1:], strict=True)
    record.measurements.append(
        Measurement(
            work="the adapter beside the native family",
            subject="quire",
            unit="ratio of output tokens/s",
            values=tuple(adapted / native for adapted, native in pairs),
        )
    )
    record.show()
    print(f"written to {record.write(out)}")


def _start(
    folder: str, implementation: str, device: str, dtype: str, running: int, threads: int | None
) -> object:
    from quire import LLM

    return LLM(
        model=folder, device=device, dtype=dtype, load_format="dummy", num_threads=threads,
        model_impl=implementation, max_num_seqs=running, max_model_len=2048,
        enable_prefix_caching=False, cache_memory_bytes=512 << 20,
    )  # fmt: skip


def _wave(llm: object, running: int, prompt: int, tokens: int, round_number: int) -> float:
    """Output tokens/s of one wave of new prompts."""
    from quire import SamplingParams

    rng = np.random.default_rng(round_number)
    prompts = [
        {"prompt_token_ids": rng.integers(10, 1000, size=prompt).tolist()} for _ in range(running)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)  # type: ignore[attr-defined]
    return running * tokens / (time.perf_counter() - begin)


if __name__ == "__main__":
    typer.run(main)
