"""What the engine itself costs: the null device answers at once, so all time is ours.

python benchmarks/engine_overhead.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.shapes import SHAPES

if TYPE_CHECKING:
    from quire import LLM


def main(
    running: Annotated[int, typer.Option(help="requests that run at once")] = 64,
    tokens: Annotated[int, typer.Option(help="output tokens of each")] = 256,
    rounds: Annotated[int, typer.Option()] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Runs waves of requests through the whole engine and prints tokens/s and time a step."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES["qwen2-0.5b"]))
        llm = _start(folder, running)
        rates = [_wave(llm, running, tokens, round_number) for round_number in range(rounds + 1)]
        llm.close()
    rates = rates[1:]  # the first warms up
    steps_ms = tuple(1000.0 * running / rate for rate in rates)
    record = Record(
        name=f"engine_overhead_{running}",
        settings={"running": running, "tokens": tokens, "rounds": rounds, "device": "null"},
    )
    work = f"{running} running requests"
    record.measurements += [
        Measurement(work=work, subject="quire", unit="output tokens/s", values=tuple(rates)),
        Measurement(work=work, subject="quire", unit="ms a step, all in", values=steps_ms),
    ]
    record.show()
    print(f"written to {record.write(out)}")


def _start(folder: str, running: int) -> LLM:
    from quire import LLM

    return LLM(model=folder, device="null", max_num_seqs=running, max_model_len=2048, block_size=16)


def _wave(llm: LLM, running: int, tokens: int, round_number: int) -> float:
    """Output tokens/s of one wave; prompts are new in each, so that no prefix is cached."""
    from quire import SamplingParams

    rng = np.random.default_rng(round_number)
    prompts = [
        {"prompt_token_ids": rng.integers(0, 1000, size=32).tolist()} for _ in range(running)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return running * tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    typer.run(main)
