"""The support matrix: one Markdown page, made from reports and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire.conformance.extensions import GRANTED, NOT_CLAIMED
from quire.conformance.records import ExtensionVerdict, Report, Row

_LEVELS = {0: "boots", 1: "kernels", 2: "runner", 3: "engine", 4: "scale"}
_DTYPES = ("float32", "bfloat16", "float16")
_REAL = "real"
_MARKS = {"interpreted": "¹", "simulated": "²"}
_OTHER_MARK = "³"
_INTRODUCTION = """# Support matrix

Which device does what, by the reports in [reports/conformance/](reports/conformance/) and by
nothing else. This page is
written by

```sh
quire conformance matrix docs/reports/conformance/*.json -o docs/support.md
```

and a test holds it to them. Anybody can make such a report: see [conformance.md](conformance.md).
"""


def render_matrix(reports: Sequence[Report]) -> str:
    """The page for these reports, by backend and device."""
    ordered = sorted(reports, key=lambda r: (r.hardware != _REAL, r.backend, r.device))
    parts = [_INTRODUCTION, _levels(ordered), _operators(ordered), _extensions(ordered)]
    return "\n".join([*parts, _origins(ordered)])


def is_on_hardware(report: Report) -> bool:
    """Whether a device, and not an interpreter or a simulation, computed."""
    return report.hardware == _REAL


def _name(report: Report) -> str:
    return (
        report.backend if is_on_hardware(report) else f"{report.backend} {_mark(report.hardware)}"
    )


def _mark(hardware: str) -> str:
    return _MARKS.get(hardware, _OTHER_MARK)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _levels(reports: Sequence[Report]) -> str:
    head = ["backend", "device", *(f"{n} {name}" for n, name in _LEVELS.items())]
    rows = [
        [_name(r), f"{r.device} {r.architecture}".strip(), *(_level(r, n) for n in _LEVELS)]
        for r in reports
    ]
    imitations = sorted({r.hardware for r in reports if not is_on_hardware(r)})
    notes = [f"\n{_mark(kind)} {kind}; **never run on hardware**.\n" for kind in imitations]
    return f"## Levels\n\n{_table(head, rows)}{''.join(notes)}"


def _level(report: Report, level: int) -> str:
    verdict = next((v for v in report.verdicts if v.level == level), None)
    if verdict is None:
        return "not run"
    if not verdict.is_granted:
        return "no"
    plural = "" if verdict.num_exceptions == 1 else "s"
    with_exceptions = f" with {verdict.num_exceptions} exception{plural}"
    return f"yes{with_exceptions if verdict.num_exceptions else ''}"


def _operators(reports: Sequence[Report]) -> str:
    columns = [(r, dtype) for r in reports for dtype in _DTYPES if dtype in _dtypes_of(r)]
    ops = sorted({row.op for r in reports for row in r.rows if row.level == 1})
    head = ["operator", *(f"{_name(r)} {dtype}" for r, dtype in columns)]
    rows = [[f"`{op}`", *(_cell(r, op, dtype) for r, dtype in columns)] for op in ops]
    text = (
        "## Operators\n\nThe largest error as a share of what rounding explains, or the outcome. "
        "Empty: the operator has no variant of that dtype.\n\n"
    )
    return text + _table(head, rows)


def _dtypes_of(report: Report) -> set[str]:
    return {row.dtype for row in report.rows if row.level == 1 and row.outcome != "unsupported"}


def _cell(report: Report, op: str, dtype: str) -> str:
    rows = [row for row in report.rows if (row.level, row.op) == (1, op)]
    of_dtype = [row for row in rows if row.dtype == dtype]
    has_none = all(not row.dtype for row in rows)
    shown = rows if has_none else of_dtype
    return _outcome(shown) if shown else ""


def _outcome(rows: Sequence[Row]) -> str:
    outcomes = {row.outcome for row in rows}
    if outcomes & {"failed", "unexpected_pass"}:
        return "**failed**"
    if "excused" in outcomes:
        return "excused"
    if outcomes == {"unsupported"}:
        return "not claimed"
    worst = max((row.headroom for row in rows if row.headroom is not None), default=None)
    return "passed" if worst is None else f"{worst:.0%}"


def _extensions(reports: Sequence[Report]) -> str:
    names = sorted({verdict.name for report in reports for verdict in report.extensions})
    head = ["extension", *(_name(report) for report in reports)]
    rows = []
    for name in names:
        said = [next((v for v in report.extensions if v.name == name), None) for report in reports]
        cells = ["" if v is None else _extension(v) for v in said]
        rows.append([f"`{name}`", *cells])
    text = "## Extensions\n\nNever needed for a level, and granted by none.\n\n"
    return text + (_table(head, rows) if names else "No device claims one.\n")


def _extension(verdict: ExtensionVerdict) -> str:
    if verdict.outcome == NOT_CLAIMED:
        return ""
    return "yes" if verdict.outcome == GRANTED else verdict.text


def _origins(reports: Sequence[Report]) -> str:
    head = ["backend", "package", "quire", "run", "tests", "sealed", "computed by"]
    rows = [
        [
            _name(r),
            r.distribution,
            r.quire_version,
            f"{r.created[:10]}, seed {r.seed}",
            ", ".join(f"{count} {name}" for name, count in r.counts.items()),
            "yes" if r.is_sealed else "**no**",
            "the device" if is_on_hardware(r) else r.hardware,
        ]
        for r in reports
    ]
    return f"## Where this comes from\n\n{_table(head, rows)}"
