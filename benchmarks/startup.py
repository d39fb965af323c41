"""How long `import quire` and the first answer of the command line take, as whole processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from quire.benchmarks.recording import Measurement, Record

PROGRAMS = {
    "python, nothing": ["-c", "pass"],
    "import quire": ["-c", "import quire"],
    "quire --help": ["-m", "quire", "--help"],
}


def main(
    rounds: Annotated[int, typer.Option()] = 9,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Interleaves the programs and prints the median of each."""
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, arguments in PROGRAMS.items():
            seconds[name].append(_time(arguments))
    record = Record(name="startup", settings={"rounds": rounds})
    base = seconds["python, nothing"]
    for name, values in seconds.items():
        ms = tuple(1000 * value for value in values)
        record.measurements.append(
            Measurement(work=name, subject="whole process", unit="ms", values=ms)
        )
        beyond = tuple(1000 * (v - b) for v, b in zip(values, base, strict=True))
        record.measurements.append(
            Measurement(work=name, subject="beyond the interpreter", unit="ms", values=beyond)
        )
    record.show()
    print(f"written to {record.write(out)}")


def _time(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
