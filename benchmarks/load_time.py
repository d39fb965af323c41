"""From nothing to a model's first token: where the seconds go, and how much memory at the peak.

python benchmarks/load_time.py --shape qwen2-0.5b --threads 2

Each round starts a new process, with the file in the page cache. It imports torch and what reads
configs first, so that loading itself is told apart from starting Python; then it makes an `LLM` and
asks it for one token. Its cache is small, and filled afterwards. Memory is the most that was
resident, less that of a process that has served a model of next to no weights: until the first
token over what the engine says its packed weights take, and with the cache filled over weights and
cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.shapes import make_model

_CHILD = """
import json, resource, sys, time
def resident(field):
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) * 1024 for l in file if l.startswith(field))
start = time.perf_counter()
import torch, transformers
from transformers import AutoConfig
imported, before = time.perf_counter(), resident("VmRSS")
from quire import LLM, SamplingParams
directory, dtype, quantization, threads, cache = sys.argv[1:]
llm = LLM(
    directory, dtype=dtype, quantization=quantization or None, num_threads=int(threads),
    cache_memory_bytes=int(cache), max_model_len=512,
)
loaded = time.perf_counter()
one = SamplingParams(max_tokens=1, detokenize=False)
llm.generate([[1, 2, 3, 4]], one)
done, peak = time.perf_counter(), resident("VmHWM")
for number in range(llm.facts.num_cache_tokens // 256 + 1):
    llm.generate([[number] * 256], one)
print(json.dumps({
    "imports": imported - start, "LLM(...)": loaded - imported, "first token": done - loaded,
    "first peak": peak, "last peak": resident("VmHWM"), "weights": llm.facts.weight_bytes,
    "cache": llm.statistics().memory_bytes["cache"],
}))
"""
_CACHE_BYTES = 16 * 2**20
_SMALL_SHAPE = "qwen2-tiny"
"""Of the model of next to no weights."""

_STAGES = ("imports", "LLM(...)", "first token")


def main(
    shape: Annotated[str, typer.Option()] = "qwen2-0.5b",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    quantization: Annotated[str, typer.Option(help="int8 or int4, at load")] = "",
    rounds: Annotated[int, typer.Option()] = 5,
    threads: Annotated[int, typer.Option()] = 2,
    folder: Annotated[Path | None, typer.Option(help="where the model is kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Loads the model in process after process; the first warms the page cache and is dropped."""
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    directory = make_model(shape, home, dtype=dtype)
    options = [dtype, quantization, str(threads), str(_CACHE_BYTES)]
    arguments = [str(directory), *options]
    bare = _load([str(make_model(_SMALL_SHAPE, home, dtype=dtype)), *options])["first peak"]
    answers = [_load(arguments) for _ in range(rounds + 1)][1:]
    record = Record(
        name=f"load_time_{shape}_{quantization or dtype}",
        settings={"shape": shape, "dtype": dtype, "threads": threads, "rounds": rounds},
    )
    totals = [{"LLM(...) to first token": a["LLM(...)"] + a["first token"], **a} for a in answers]
    for stage in ("LLM(...) to first token", *_STAGES):
        values = tuple(total[stage] for total in totals)
        record.measurements.append(Measurement(work="load", subject=stage, unit="s", values=values))
    record.measurements += _memory(answers, bare)
    record.show()
    print(f"written to {record.write(out)}")


def _memory(answers: list[dict[str, float]], bare: float) -> list[Measurement]:
    weights, cache = answers[0]["weights"], answers[0]["cache"]
    first = tuple((answer["first peak"] - bare) / weights for answer in answers)
    last = tuple((answer["last peak"] - bare) / (weights + cache) for answer in answers)
    process = f"a process without a model {bare / 2**20:.0f} MiB"
    sizes = f"packed weights {weights / 2**20:.0f} MiB, cache {cache / 2**20:.0f} MiB, {process}"
    rows = (("first token, over weights", first), ("cache filled, over weights + cache", last))
    return [
        Measurement(work="peak memory", subject=subject, unit="ratio", values=values, note=sizes)
        for subject, values in rows
    ]


def _load(arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    typer.run(main)
