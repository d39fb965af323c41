"""Writes docs/performance.md from the JSON under benchmarks/results; no figure is written by hand.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.benchmarks.recording import RESULTS

PAGE = RESULTS.parent.parent / "docs" / "performance.md"
_LISTS = frozenset({"left_out", "not_measured"})
"""Facts that are told line by line."""
HEAD = """\
# Performance

Made by `python benchmarks/report.py` from the records under `benchmarks/results`. Each record holds
the command, the machine and the versions, and every single run. Ratios are taken run by run, the
two subjects in turn in one process; single figures depend on the machine and on who else uses it.
"""


def main(
    page: Annotated[Path, typer.Option(help="the page to write")] = PAGE,
) -> None:
    """Writes the page."""
    page.write_text(make_page())
    print(f"written to {page}")


def make_page(results: Path = RESULTS) -> str:
    """The page as it follows from the records."""
    sections = [HEAD]
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text())
        if "measurements" in record:
            sections.append("\n".join([*_section(record), *_plot(path)]))
    return "\n".join(sections)


def _section(record: dict[str, Any]) -> Iterator[str]:
    machine, versions = record["machine"], record["versions"]
    yield f"## {record['benchmark']}\n"
    yield f"`{record['command']}`, {record['date']}\n"
    yield (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"Python {machine['python']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + "\n"
    )
    yield "| work | subject | median | min | max | unit |"
    yield "|---|---|---|---|---|---|"
    for m in record["measurements"]:
        yield f"| {m['work']} | {m['subject']} | {_figures(m)} | {m['unit']} |"
    yield ""
    yield from _ratios(record)
    yield from _notes(record)


def _plot(path: Path) -> Iterator[str]:
    """The chart that a program drew beside its record."""
    chart = path.with_suffix(".svg")
    if chart.is_file():
        yield f"![medians of {path.stem}](../benchmarks/results/{chart.name})\n"


def _ratios(record: dict[str, Any]) -> Iterator[str]:
    if not record["ratios"]:
        return
    yield "| work | ratio | median | min | max |"
    yield "|---|---|---|---|---|"
    for r in record["ratios"]:
        yield f"| {r['work']} | {r['better']} / {r['worse']} | {_figures(r)} |"
    yield ""


def _notes(record: dict[str, Any]) -> Iterator[str]:
    notes = [
        f"- {m['work']}, {m['subject']}: {m['note']}" for m in record["measurements"] if m["note"]
    ]
    # Who did not take part, and why.
    for name, value in record["facts"].items():
        lines = value if name in _LISTS else [value]
        notes += [f"- {name}: {line}" for line in lines if _is_said(line)]
    if notes:
        yield from [*notes, ""]


def _is_said(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _figures(entry: dict[str, Any]) -> str:
    values = entry["values"]
    return " | ".join(f"{value:,.2f}" for value in (entry["median"], min(values), max(values)))


if __name__ == "__main__":
    typer.run(main)
