"""Compiles every kernel for architectures that need not be here, and holds them to their tables.

    python -m quire.kernels_triton TABLE.json ... [--only WORD] [--jobs N] [--json FILE]

Prints a line a kernel and ends with 1 if one breaks what its launch table promises.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from quire.kernels_triton.catalogue import record_all
from quire.kernels_triton.launch import read_table
from quire.kernels_triton.offline import Job, RecordingLauncher, Usage, compile_job

_FP8 = {"sm_89": "float8_e4m3fn", "sm_90": "float8_e4m3fn", "sm_100": "float8_e4m3fn"}
_FP8 |= {"gfx942": "float8_e4m3fnuz", "gfx1201": "float8_e4m3fn"}


def jobs_of(path: Path, only: str = "") -> tuple[list[Job], RecordingLauncher]:
    """What a table's architecture has to run, and the launcher that noted it."""
    import torch

    launcher = RecordingLauncher(read_table(path))
    name = _FP8.get(launcher.table.architecture)
    record_all(launcher, fp8=getattr(torch, name) if name else None)
    return [job for job in launcher.jobs.values() if only in job.name], launcher


def compile_numbered(path: Path, only: str, number: int) -> Usage:
    """Compiles one job of a table: jobs do not travel between processes, numbers do."""
    jobs, launcher = jobs_of(path, only)
    return compile_job(jobs[number], launcher.table)


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 where something does not compile or breaks a promise."""
    options = _parse(arguments)
    work = [
        (path, options.only, number)
        for path in options.tables
        for number in range(len(jobs_of(path, options.only)[0]))
    ]
    if options.jobs == 1:
        usages = [compile_numbered(*one) for one in work]
        return _report(usages, options.json)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        usages = list(pool.map(compile_numbered, *zip(*work, strict=True)) if work else ())
    return _report(usages, options.json)


def _report(usages: Sequence[Usage], file: Path | None) -> int:
    for usage in usages:
        _show(usage)
    if file:
        text = json.dumps([asdict(usage) for usage in usages], indent=1)
        file.write_text(text + "\n", encoding="utf-8")
    return int(not usages or any(usage.findings for usage in usages))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m quire.kernels_triton")
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--only", default="", help="only kernels whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _show(usage: Usage) -> None:
    state = "; ".join(usage.findings) or "ok"
    line = (
        f"{usage.target:8} {usage.name:58} reg {usage.registers:4} spill {usage.spill_bytes:5} "
        f"shared {usage.shared_bytes:7} matrix {usage.matrix_instructions:4} {state}"
    )
    sys.stdout.write(line + "\n")
