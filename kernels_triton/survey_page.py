"""What compilers make of the kernels, as one Markdown page: from the survey's file alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_INTRODUCTION = """# Kernels, compiled without a device

Every Triton kernel in every launch of every launch table, compiled for the architecture of the
table on a machine that need not have it: what the compiler says of registers, spills, shared memory
and matrix instructions. It says nothing of speed, and **nothing of this shows a run on hardware**.
This page is written from [reports/kernels.json](reports/kernels.json) alone, by

```sh
make kernels
```

and a test holds it to the file.
"""
Row = Mapping[str, Any]


def render_survey(data: Mapping[str, Any]) -> str:
    """The page. `data`: the contents of the survey's file."""
    targets, rows = data["targets"], data["kernels"]
    parts = [
        _INTRODUCTION,
        _summary(targets, rows),
        _kernels(list(targets), rows),
        _spills(rows),
        _findings(rows),
    ]
    return "\n".join(part for part in parts if part)


def _summary(targets: Mapping[str, Any], rows: Sequence[Row]) -> str:
    head = ["architecture", "kernels compiled", "break a promise", "spill nothing"]
    head += ["multiply in matrix units", "most shared memory", "Triton", "date"]
    lines = []
    for name, origin in targets.items():
        own = [row for row in rows if row["target"] == name]
        wanting = [row for row in own if row.get("wants_matrix")]
        have = sum(row["matrix_instructions"] > 0 for row in wanting)
        most = max(row["shared_bytes"] for row in own)
        lines.append(
            [
                name,
                str(len(own)),
                str(sum(bool(row.get("findings", ())) for row in own)),
                str(sum(row["spill_bytes"] == 0 for row in own)),
                f"{have} of {len(wanting)} that should",
                f"{most} of {origin['shared_bytes']} bytes",
                origin["triton"],
                origin["date"],
            ]
        )
    return f"## Architectures\n\n{_table(head, lines)}"


def _kernels(targets: Sequence[str], rows: Sequence[Row]) -> str:
    """By row of the launch tables: how many machine codes, and the most that one of them takes."""
    names = sorted({row["row"] for row in rows})
    lines = []
    for name in names:
        cells = [[r for r in rows if (r["row"], r["target"]) == (name, t)] for t in targets]
        lines.append([f"`{name}`", *map(_most, cells)])
    text = (
        "## Kernels\n\nMachine codes; the most registers of a thread, bytes spilled where any are "
        "(`s`), and kibibytes of shared memory that one of them takes.\n\n"
    )
    return text + _table(["row of the tables", *targets], lines)


def _most(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    registers, spill, shared = (
        max(row[name] for row in rows) for name in ("registers", "spill_bytes", "shared_bytes")
    )
    spilled = f", {spill} s" if spill else ""
    return f"{len(rows)}: {registers}{spilled}, {shared / 1024:.0f}"


def _spills(rows: Sequence[Row]) -> str:
    spilling = [row for row in rows if row["spill_bytes"] and not row.get("findings", ())]
    if not spilling:
        return "## Spills\n\nNone.\n"
    lines = [
        [
            row["target"],
            f"`{row['name']}`",
            str(row["spill_bytes"]),
            str(row.get("allowed_spill_bytes", 0)),
        ]
        for row in spilling
    ]
    text = "## Spills that a table allows\n\nThe table's row says why.\n\n"
    return text + _table(["architecture", "kernel", "bytes", "allowed"], lines)


def _findings(rows: Sequence[Row]) -> str:
    lines = [
        [row["target"], f"`{row['name']}`", "; ".join(row.get("findings", ()))]
        for row in rows
        if row.get("findings", ())
    ]
    if not lines:
        return ""
    return "## Broken promises\n\n" + _table(["architecture", "kernel", "what"], lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
