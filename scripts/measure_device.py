#!/usr/bin/env python3
"""Measure an accelerator on a machine that has one, and take what came of it into the tree.

    python scripts/measure_device.py run cuda OUT        # there; nothing need be built or installed
    python scripts/measure_device.py take cuda OUT       # here, or there, once OUT is copied

`run` does four things one after the other: `doctor`, `accelerator` (kernels, engine and targets,
within nine minutes), `conformance` (level 2 and every extension that is claimed) and `tune` (a
launch table, in eight minutes). `--only NAME,...` does some of them. `take` puts the record, the
certificate and the table where they belong and makes the pages from them anew; what was
interpreted or a dry run is refused. torch, Triton and transformers for the device must be
importable by the Python that runs this.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
UNBUILT = (sys.executable, str(ROOT / "scripts" / "unbuilt"))
RECORD, CERTIFICATE, TABLE, TRIALS = (
    "accelerator.json",
    "conformance/report.json",
    "table.json",
    "table.trials.json",
)
TABLES = {"cuda": "kernels_cuda/tables", "rocm": "kernels_rocm/tables"}


def steps(backend: str, out: Path, *, is_dry: bool) -> dict[str, list[str]]:
    """What `run` runs, by name."""
    dry = ["--dry-run"] if is_dry else []
    level, workers = ("0", "1") if is_dry else ("2", "4")
    quire = ["python", "-m", "quire"]
    certify = [*quire, "conformance", "run", "--backend", backend, "--level", level]
    measure = ["python", "-m", "quire.benchmarks.accelerator", "--backend", backend, *dry]
    return {
        "doctor": [*quire, "doctor"],
        "accelerator": [*measure, "--out", str(out / RECORD)],
        "conformance": [*certify, "-n", workers, "--report", str((out / CERTIFICATE).parent)],
        "tune": [*quire, "tune", "--device", backend, "--out", str(out / TABLE), *dry],
    }


def run(backend: str, out: Path, only: Sequence[str], *, is_dry: bool) -> int:
    """Runs the steps that are asked for; 1 if one failed. What each says is kept in OUT, too."""
    out.mkdir(parents=True, exist_ok=True)
    summary = []
    for name, command in steps(backend, out.resolve(), is_dry=is_dry).items():
        if only and name not in only:
            continue
        print(f"--- {name}: {' '.join(command)}", flush=True)
        begin = time.monotonic()
        status = _run_one(command, out / f"{name}.txt")
        summary.append((name, status, time.monotonic() - begin))
    for name, status, seconds in summary:
        print(f"{name}: {'done' if status == 0 else f'ended with {status}'} in {seconds:.0f} s")
    return int(any(status for _, status, _ in summary))


def _run_one(command: Sequence[str], log: Path) -> int:
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*UNBUILT, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            file.write(line)
        return process.wait()


def take(backend: str, out: Path, root: Path) -> list[Path]:
    """Copies what is in OUT to its place under `root`; returns the places.

    Raises: SystemExit, before anything is copied, if something there was measured by no device.
    """
    places = _places(backend, out, root)
    for _, _, check, path in places:
        why = check(json.loads(path.read_text(encoding="utf-8")))
        if why:
            sys.exit(f"{path}: {why}; nothing was taken")
    for _, target, _, path in places:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        print(f"{path} -> {target}")
    return [target for _, target, _, _ in places]


def _places(
    backend: str, out: Path, root: Path
) -> list[tuple[str, Path, Callable[[Any], str], Path]]:
    """(what, where it goes, what is wrong with it, where it is) of what there is."""
    wanted = [
        (
            RECORD,
            root / "benchmarks" / "results" / f"accelerator_{backend}.json",
            _is_no_record,
        ),
        (
            CERTIFICATE,
            root / "docs" / "reports" / "conformance" / f"{backend}.json",
            _is_no_certificate,
        ),
    ]
    table = out / TABLE
    if backend in TABLES and table.exists():
        architecture = json.loads(table.read_text(encoding="utf-8"))["architecture"]
        trials = root / "docs" / "reports" / f"tuning_{architecture}.json"
        wanted += [
            (TABLE, root / TABLES[backend] / f"{architecture}.json", _is_no_table),
            (TRIALS, trials, lambda _: ""),
        ]
    return [
        (name, target, check, out / name) for name, target, check in wanted if (out / name).exists()
    ]


def _is_no_record(record: Any) -> str:
    is_dry = record["benchmark"].endswith("_dry") or "interpreter" in record["settings"]["device"]
    return "a dry run, whose figures mean nothing" if is_dry else ""


def _is_no_certificate(report: Any) -> str:
    kind = report["hardware"]
    return "" if kind == "real" else f"of a device that is {kind}"


def _is_no_table(table: Any) -> str:
    is_dry = "dry run" in table["provenance"]["method"]
    return "a dry run, whose figures mean nothing" if is_dry else ""


def write_pages() -> int:
    """Makes the pages that the files are shown on."""
    certificates = sorted((ROOT / "docs" / "reports" / "conformance").glob("*.json"))
    matrix = ["python", "-m", "quire", "conformance", "matrix", *map(str, certificates)]
    commands = (
        ["python", "-m", "quire.benchmarks.report"],
        [*matrix, "-o", str(ROOT / "docs" / "support.md")],
    )
    return max(subprocess.call([*UNBUILT, *command], cwd=ROOT) for command in commands)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "take"))
    parser.add_argument("backend", help="cuda, rocm or xpu")
    parser.add_argument("out", type=Path, help="a folder for what comes of it")
    parser.add_argument("--only", default="", help="some of doctor,accelerator,conformance,tune")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; means nothing")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    unknown = set(only) - set(steps(arguments.backend, arguments.out, is_dry=True))
    if unknown:
        parser.error(f"--only knows no {', '.join(sorted(unknown))}")
    if arguments.what == "run":
        return run(arguments.backend, arguments.out, only, is_dry=arguments.dry_run)
    if not take(arguments.backend, arguments.out, ROOT):
        sys.exit(f"{arguments.out} holds nothing to take; `run` fills it")
    print("with a new table: `make kernels` compiles it; docs/accelerators.md says what has run")
    return write_pages()


if __name__ == "__main__":
    sys.exit(main())
