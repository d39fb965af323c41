"""From nothing to a model's first token: where the seconds go, and how much memory at the peak.

python benchmarks/load_time.py --shape qwen2-0.5b --threads 2

Each round starts a new process, with the file in the page cache. It imports torch and what reads
configs first, so that loading itself is told apart from starting Python; then it makes an `LLM` and
asks it for one token. Memory is the most that was resident, less what the imports took, over what
the engine says its packed weights take.
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
directory, dtype, quantization, threads = sys.argv[1:]
llm = LLM(directory, dtype=dtype, quantization=quantization or None, num_threads=int(threads))
loaded = time.perf_counter()
llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, detokenize=False))
done = time.perf_counter()
print(json.dumps({
    "imports": imported - start, "LLM(...)": loaded - imported, "first token": done - loaded,
    "peak": resident("VmHWM") - before, "weights": llm.facts.weight_bytes,
}))
"""

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
    arguments = [str(directory), dtype, quantization, str(threads)]
    answers = [_load(arguments) for _ in range(rounds + 1)][1:]
    record = Record(
        name=f"load_time_{shape}_{quantization or dtype}",
        settings={"shape": shape, "dtype": dtype, "threads": threads, "rounds": rounds},
    )
    totals = [{"LLM(...) to first token": a["LLM(...)"] + a["first token"], **a} for a in answers]
    for stage in ("LLM(...) to first token", *_STAGES):
        values = tuple(total[stage] for total in totals)
        record.measurements.append(Measurement(work="load", subject=stage, unit="s", values=values))
    record.measurements.append(
        Measurement(
            work="peak memory",
            subject="resident / packed weights",
            unit="ratio",
            values=tuple(answer["peak"] / answer["weights"] for answer in answers),
            note=f"packed weights {answers[0]['weights'] / 2**20:.0f} MiB",
        )
    )
    record.show()
    print(f"written to {record.write(out)}")


def _load(arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    typer.run(main)
