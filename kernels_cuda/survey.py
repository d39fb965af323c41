"""Compiles every kernel of CUDA C++ by nvcc for architectures that need not be here.

    python -m quire.kernels_cuda [--nvcc FILE] [ARCHITECTURE ...]

Without names: for every architecture that has a launch table. Prints a line a kernel and ends with
1 if one does not compile or spills. On a machine that runs them NVRTC compiles the same sources.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire.kernels_cuda import TABLES
from quire.kernels_cuda.driver import SOURCES

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a compiled kernel takes of its device."""

    name: str
    architecture: str
    registers: int
    spill_bytes: int
    """A thread's frame in memory, and what is written to and read from it."""


def architectures() -> list[str]:
    """Those with a launch table."""
    return sorted((path.stem for path in TABLES.glob("*.json")), key=lambda name: int(name[3:]))


def compile_all(nvcc: str, names: Sequence[str]) -> Iterator[Usage]:
    """Every source for every architecture of `names`.

    Raises: ValueError with the compiler's words for a source that it does not take.
    """
    for source in sorted(SOURCES.glob("*.cu")):
        for name in names:
            yield from _compile(nvcc, source, name)


def _compile(nvcc: str, source: Path, architecture: str) -> list[Usage]:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "kernel.cubin"
        done = subprocess.run(  # noqa: S603 - the compiler that was named, on our own file
            [
                *(nvcc, "-cubin", "-O3", "-std=c++17", f"-arch={architecture}", "-Werror"),
                *("all-warnings", "-Xptxas", "-v", "-o", str(image), str(source)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not image.exists():
            raise ValueError(f"{source.name} does not compile for {architecture}: {done.stderr}")
    said = done.stderr + done.stdout
    parts = _ENTRY.split(said)[1:]
    return [
        _usage(name, architecture, text) for name, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def _usage(name: str, architecture: str, said: str) -> Usage:
    frame, registers = _FRAME.search(said), _REGISTERS.search(said)
    if frame is None or registers is None:
        raise ValueError(f"ptxas said nothing of the registers of {name}: {said!r}")
    return Usage(
        name=name,
        architecture=architecture,
        registers=int(registers[1]),
        spill_bytes=max(map(int, frame.groups())),
    )


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 where something does not compile or spills, 2 without a compiler."""
    parser = argparse.ArgumentParser(prog="python -m quire.kernels_cuda")
    parser.add_argument("architectures", nargs="*", default=architectures())
    parser.add_argument("--nvcc", default=shutil.which("nvcc"))
    options = parser.parse_args(arguments)
    if not options.nvcc:
        parser.error("nvcc was not found: install CUDA's toolkit, or name it by --nvcc")
    num_spilling = 0
    for usage in compile_all(options.nvcc, options.architectures):
        num_spilling += usage.spill_bytes > 0
        sys.stdout.write(
            f"{usage.architecture:8} {usage.name:24} reg {usage.registers:4} "
            f"spill {usage.spill_bytes:5}\n"
        )
    return int(num_spilling > 0)
