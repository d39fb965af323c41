"""Compiles every kernel for architectures that need not be here, and holds them to their tables.

    python -m quire.kernels_triton [TABLE.json ...] [--only WORD] [--sample N] [--jobs N]
                                   [--json FILE] [--page FILE]

Prints a line a kernel and ends with 1 if one breaks what its launch table promises. `--json` writes
what was found; architectures that the file holds already and that are not named stay in it.
`--page` writes that file's contents as Markdown; without tables nothing is compiled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from quire.kernels_triton.launch import read_table
from quire.kernels_triton.offline import Job, RecordingLauncher, Usage, compile_job
from quire.kernels_triton.survey_page import render_survey

_FP8 = {"sm_89": "float8_e4m3fn", "sm_90": "float8_e4m3fn", "sm_100": "float8_e4m3fn"}
_FP8 |= {"gfx942": "float8_e4m3fnuz", "gfx1201": "float8_e4m3fn"}
_NUMBERS = {"registers", "spill_bytes", "shared_bytes", "matrix_instructions"}
"""Written also where they are 0."""
_PER_PROCESS = 4
"""Jobs that a process takes at a time."""


@cache
def jobs_of(path: Path, only: str = "") -> tuple[list[Job], RecordingLauncher]:
    """What a table's architecture has to run, and the launcher that noted it."""
    import torch

    from quire.kernels_triton.catalogue import record_all

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
    usages = []
    for usage in _compile_all(options):
        _show(usage)
        usages.append(usage)
    if options.json and usages:
        _merge(usages, options.tables, options.json)
    if options.page:
        data = json.loads(options.json.read_text(encoding="utf-8"))
        options.page.write_text(render_survey(data), encoding="utf-8")
    is_empty = bool(options.tables) and not usages
    return int(is_empty or any(usage.findings for usage in usages))


def _compile_all(options: argparse.Namespace) -> Iterator[Usage]:
    work = [
        (path, options.only, number)
        for path in options.tables
        for number in range(0, len(jobs_of(path, options.only)[0]), options.sample)
    ]
    if options.jobs == 1 or not work:
        yield from (compile_numbered(*one) for one in work)
        return
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        columns = zip(*work, strict=True)
        yield from pool.map(compile_numbered, *columns, chunksize=_PER_PROCESS)


def _merge(usages: Sequence[Usage], tables: Sequence[Path], file: Path) -> None:
    """Puts what was found into the file, in the order of architectures; a line a kernel."""
    data: dict[str, Any] = {"targets": {}, "kernels": []}
    if file.exists():
        data = json.loads(file.read_text(encoding="utf-8"))
    names = {read_table(path).architecture: path for path in tables}
    kept = [row for row in data["kernels"] if row["target"] not in names]
    origins = {name: _provenance(path) for name, path in names.items()}
    targets = dict(sorted({**data["targets"], **origins}.items()))
    found = [{k: v for k, v in asdict(usage).items() if v or k in _NUMBERS} for usage in usages]
    rows = sorted([*kept, *found], key=lambda row: (row["target"], row["name"]))
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    head = json.dumps(targets, indent=1).replace("\n", "\n ")
    text = f'{{\n "targets": {head},\n "kernels": [\n{lines}\n ]\n}}\n'
    file.write_text(text, encoding="utf-8")


def _provenance(path: Path) -> dict[str, Any]:
    """Of one architecture: with what, when and of which sources its kernels were compiled."""
    table = read_table(path)
    return {
        "shared_bytes": table.facts["shared_bytes"],
        "triton": version("triton"),
        "torch": version("torch"),
        "date": datetime.now(UTC).date().isoformat(),
        "sources": sources_hash(path),
    }


def sources_hash(table: Path) -> str:
    """Of this package's sources and tables and the architecture's own table."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder / "tables" / "portable.json", table]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m quire.kernels_triton")
    parser.add_argument("tables", nargs="*", type=Path)
    parser.add_argument("--only", default="", help="only kernels whose name has this in it")
    parser.add_argument("--sample", type=int, default=1, help="only every Nth kernel")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="writes what --json holds as Markdown")
    options = parser.parse_args(arguments)
    if options.page and not options.json:
        parser.error("--page shows what --json holds: name it too")
    if not options.tables and not options.page:
        parser.error("name a table, or a page to write")
    return options


def _show(usage: Usage) -> None:
    state = "; ".join(usage.findings) or "ok"
    line = (
        f"{usage.target:8} {usage.name:58} reg {usage.registers:4} spill {usage.spill_bytes:5} "
        f"shared {usage.shared_bytes:7} matrix {usage.matrix_instructions:4} {state}"
    )
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
