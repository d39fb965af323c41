"""A report as one self-contained HTML page: no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from quire.conformance.records import Report, Row

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;
color:#1b1f24;background:#fff}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.verdict{padding:.8rem 1rem;border-radius:.5rem;margin:1rem 0;font-weight:600}
.good{background:#dcf5e3}.bad{background:#fde0de}p.note{color:#57606a}
table{border-collapse:collapse;width:100%}th,td{padding:.3rem .6rem;text-align:left;
border-bottom:1px solid #e3e6ea;vertical-align:top}th{font-weight:600}td.cell{text-align:center;
border:1px solid #fff}code{font-size:.85em;overflow-wrap:anywhere}
"""
_SCALE = (
    (0.0, "#e8eef4", "exact"),
    (0.5, "#c9efd3", "under half of the bound"),
    (0.9, "#fdf1bf", "under nine tenths"),
    (1.0, "#fbd5a5", "close to the bound"),
)
_FAILED, _UNSUPPORTED, _EXCUSED = "#f6b2ad", "#eceef0", "#e3d5f3"


def render(report: Report, baseline: Report | None = None) -> str:
    """The page; with `baseline`, also what changed since that report."""
    parts = [
        f"<h1>{escape(report.backend)} on {escape(report.device)}</h1>",
        _verdict(report),
        _facts(report),
        "<h2>Headroom by operator and dtype</h2>",
        _legend(),
        _matrix(report.rows),
        _listing("Failures", report.rows, ("failed", "unexpected_pass")),
        _listing("Exceptions", report.rows, ("excused",)),
        _problems(report),
        _difference(report, baseline),
        _cost(report),
        _unsupported(report.rows),
    ]
    title = escape(report.headline)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _verdict(report: Report) -> str:
    kind = "good" if report.is_passed else "bad"
    others = "; ".join(verdict.text for verdict in report.verdicts)
    return (
        f'<p class="verdict {kind}">{escape(report.headline)}</p>'
        f'<p class="note">{escape(others)}</p>'
    )


def _facts(report: Report) -> str:
    facts = {
        "Package": report.distribution,
        "Device": f"{report.device} {report.architecture}",
        "Tests": ", ".join(f"{count} {name}" for name, count in report.counts.items()),
        "Run": f"{report.created}, seed {report.seed}, {'' if report.is_sealed else 'un'}sealed",
        "Quire": f"{report.quire_version}, interface {report.interface_version}",
        "Environment": ", ".join(f"{k} {v}" for k, v in report.environment.items()),
    }
    rows = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _legend() -> str:
    colours = [(colour, text) for _, colour, text in _SCALE]
    colours += [(_FAILED, "failed"), (_EXCUSED, "excused"), (_UNSUPPORTED, "not claimed")]
    marks = (f'<span style="background:{c};padding:.1rem .4rem">{t}</span>' for c, t in colours)
    return f'<p class="note">The largest error as a share of its bound. {" ".join(marks)}</p>'


def _matrix(rows: Sequence[Row]) -> str:
    ops = list(dict.fromkeys(row.op for row in rows))
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    head = "".join(f"<th>{escape(dtype or 'any')}</th>" for dtype in dtypes)
    lines = []
    for op in ops:
        cells = (_cell([r for r in rows if (r.op, r.dtype) == (op, d)]) for d in dtypes)
        served = sorted({row.provider for row in rows if row.op == op and row.provider})
        by = escape(", ".join(served))
        lines.append(f"<tr><th>{escape(op)}</th>{''.join(cells)}<td>{by}</td></tr>")
    return f"<table><tr><th></th>{head}<th>served by</th></tr>{''.join(lines)}</table>"


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return "<td></td>"
    outcomes = {row.outcome for row in rows}
    headrooms = [row.headroom for row in rows if row.headroom is not None]
    worst = max(headrooms, default=0.0)
    if outcomes & {"failed", "unexpected_pass"}:
        bad = sum(row.outcome in {"failed", "unexpected_pass"} for row in rows)
        return f'<td class="cell" style="background:{_FAILED}">{bad} of {len(rows)} failed</td>'
    if "excused" in outcomes:
        return f'<td class="cell" style="background:{_EXCUSED}">excused</td>'
    if outcomes == {"unsupported"}:
        return f'<td class="cell" style="background:{_UNSUPPORTED}">not claimed</td>'
    colour = next(colour for limit, colour, _ in _SCALE if worst <= limit)
    text = f"{worst:.0%}" if headrooms else "passed"
    return f'<td class="cell" style="background:{colour}" title="{len(rows)} tests">{text}</td>'


def _listing(title: str, rows: Sequence[Row], outcomes: Sequence[str]) -> str:
    chosen = [row for row in rows if row.outcome in outcomes]
    if not chosen:
        return ""
    return f"<h2>{title}</h2>{_table((row.id, row.reason) for row in chosen)}"


def _table(lines: Iterable[tuple[str, str]]) -> str:
    rows = (f"<tr><td><code>{escape(a)}</code></td><td>{escape(b)}</td></tr>" for a, b in lines)
    return f"<table>{''.join(rows)}</table>"


def _problems(report: Report) -> str:
    texts = [*report.problems, *(f"{name}: missing" for name in report.missing)]
    if not texts:
        return ""
    items = "".join(f"<li><code>{escape(text)}</code></li>" for text in texts)
    return f"<h2>Problems</h2><ul>{items}</ul>"


def _difference(report: Report, baseline: Report | None) -> str:
    if baseline is None:
        return ""
    before = {row.id: row for row in baseline.rows}
    lines = []
    for row in report.rows:
        old = before.get(row.id)
        if old is None or old.outcome != row.outcome:
            lines.append((row.id, f"{old.outcome if old else 'not there'} → {row.outcome}"))
        elif (row.headroom or 0) > 2 * (old.headroom or 0) and (row.headroom or 0) > 0.5:
            lines.append((row.id, f"headroom {old.headroom or 0:.2f} → {row.headroom:.2f}"))
    gone = sorted(set(before) - {row.id for row in report.rows})
    lines += [(name, "no longer there") for name in gone]
    body = _table(lines) if lines else '<p class="note">Nothing changed.</p>'
    return f"<h2>Since {escape(baseline.created)}</h2>{body}"


def _cost(report: Report) -> str:
    cost = report.cost
    patches = ", ".join(cost.assignments) or "none"
    return "<h2>What it cost its vendor</h2>" + _table(
        (
            ("lines of Python", f"{cost.lines_of_code} in {cost.files} files"),
            ("modules of Quire imported", ", ".join(cost.quire_modules) or "none"),
            ("assignments onto Quire's objects", patches),
        )
    )


def _unsupported(rows: Sequence[Row]) -> str:
    reasons: dict[str, int] = {}
    for row in rows:
        if row.outcome == "unsupported":
            reasons[row.reason] = reasons.get(row.reason, 0) + 1
    if not reasons:
        return ""
    return "<h2>Not claimed</h2>" + _table((f"{n} tests", why) for why, n in reasons.items())
