"""Keeps what a benchmark measured, with machine, versions and command: a table and JSON."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("quire", "torch", "transformers", "tokenizers", "numpy", "triton")
_WIDTH = 160
"""Of tables that no terminal shows: wide enough that no name is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One figure, from several runs."""

    work: str
    subject: str
    """Who did it: `quire`, `transformers`."""
    unit: str
    values: tuple[float, ...]
    """One a run, in the order of the runs."""
    note: str = ""

    @property
    def median(self) -> float:
        """The figure to quote."""
        return median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One subject against another, run by run in one process."""

    work: str
    better: str
    worse: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return median(self.values)


@dataclass(slots=True, kw_only=True)
class Record:
    """One run of a benchmark program."""

    name: str
    settings: Mapping[str, Any]
    measurements: list[Measurement] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def show(self) -> None:
        """Prints the figures."""
        console = make_console()
        console.print(_measurement_table(self.name, self.measurements))
        if self.ratios:
            console.print(_ratio_table(self.ratios))
        for name, value in self.facts.items():
            lines = value if isinstance(value, list) else [value]
            for line in lines:
                console.print(f"{name}: {line}", soft_wrap=True, markup=False)

    def write(self, path: Path | None) -> Path:
        """Writes the record as JSON; None: under benchmarks/results, named after the benchmark."""
        target = path or RESULTS / f"{self.name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "benchmark": self.name,
            "date": time.strftime("%Y-%m-%d"),
            "command": " ".join(["python", *_relative_command(sys.argv)]),
            "machine": machine_facts(),
            "versions": package_versions(),
            "settings": dict(self.settings),
            "measurements": [{**asdict(m), "median": m.median} for m in self.measurements],
            "ratios": [{**asdict(r), "median": r.median} for r in self.ratios],
            "facts": self.facts,
        }
        target.write_text(json.dumps(document, indent=1, default=str) + "\n")
        return target


def make_console() -> Console:
    """Where tables are printed."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def paired_ratio(work: str, better: Measurement, worse: Measurement) -> Ratio:
    """`better` over `worse`, run by run; both in a unit of which more is better."""
    values = tuple(b / w for b, w in zip(better.values, worse.values, strict=True))
    return Ratio(work=work, better=better.subject, worse=worse.subject, values=values)


def machine_facts() -> dict[str, Any]:
    """What kind of machine this is; nothing that names it."""
    import os

    return {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _relative_command(arguments: Sequence[str]) -> list[str]:
    root = Path(__file__).parent.parent
    program = Path(arguments[0]).resolve()
    shown = str(program.relative_to(root)) if program.is_relative_to(root) else program.name
    return [shown, *_without_places(arguments[1:])]


def _without_places(arguments: Sequence[str]) -> list[str]:
    """Arguments without those that say where files lie: no figure needs them."""
    kept: list[str] = []
    options = iter(arguments)
    for argument in options:
        name, _, value = argument.partition("=")
        if name not in ("--out", "--folder"):
            kept.append(argument)
        elif not value:
            next(options, None)
    return kept


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def _measurement_table(title: str, measurements: Sequence[Measurement]) -> Table:
    table = Table("work", "subject", "median", "min", "max", "unit", "note", title=title)
    for m in measurements:
        low, high = min(m.values), max(m.values)
        table.add_row(
            m.work, m.subject, f"{m.median:,.2f}", f"{low:,.2f}", f"{high:,.2f}", m.unit, m.note
        )
    return table


def _ratio_table(ratios: Sequence[Ratio]) -> Table:
    table = Table("work", "ratio", "median", "min", "max", title="ratios, run by run")
    for r in ratios:
        low, high = min(r.values), max(r.values)
        name = f"{r.better} / {r.worse}"
        table.add_row(r.work, name, f"{r.median:,.2f}", f"{low:,.2f}", f"{high:,.2f}")
    return table
