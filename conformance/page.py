"""A report as one self-contained HTML page: no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from quire.conformance.records import Report, Row

_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;max-width:68rem;margin:2.5rem auto;
padding:0 1.25rem;color:#1b1f24;background:#fff}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.4rem 0 .6rem}
.verdict{padding:.8rem 1rem;border-radius:.5rem;margin:1.2rem 0 .8rem;font-weight:600;
font-size:1.05rem}.good{background:#dcf5e3;color:#0f5323}.bad{background:#fde0de;color:#82140d}
.plain{background:#eef1f4;color:#57606a}.warn{background:#fdf1bf;color:#6b4e00}
p.note{color:#57606a;margin:.4rem 0}.sub{color:#57606a;margin:0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem}
.card{border-radius:.5rem;padding:.6rem .8rem}.card b{display:block}.card span{font-size:.85rem}
table{border-collapse:collapse;width:100%}th,td{padding:.35rem .6rem;text-align:left;
border-bottom:1px solid #e3e6ea;vertical-align:top}th{font-weight:600}
tr.group th{padding-top:1rem;color:#57606a;font-weight:500}
td.cell{text-align:center;border:2px solid #fff;border-radius:.5rem;min-width:6rem;
font-variant-numeric:tabular-nums}td.number{text-align:right;font-variant-numeric:tabular-nums}
td.by{color:#57606a;font-size:.9rem}code{font-size:.85em;overflow-wrap:anywhere}
.key{display:inline-block;padding:.05rem .5rem;border-radius:.3rem;margin:.1rem .15rem}
.bar{display:inline-block;height:.6rem;border-radius:.2rem;vertical-align:middle}
details summary{cursor:pointer;color:#57606a}
"""
_LEVELS = ("boots", "kernels", "runner", "engine", "scale")
_NUM_CLOSEST = 8
_SCALE = (
    (0.0, "#e8eef4", "exact"),
    (0.5, "#c9efd3", "under half of the bound"),
    (0.9, "#fdf1bf", "under nine tenths"),
    (1.0, "#fbd5a5", "close to the bound"),
)
_NOTABLE = 0.5
"""A share of the bound below which growth is no news."""
_FAILED, _UNSUPPORTED, _EXCUSED = "#f6b2ad", "#eceef0", "#e3d5f3"


def render(report: Report, baseline: Report | None = None) -> str:
    """The page; with `baseline`, also what changed since that report."""
    parts = [
        f"<h1>{escape(report.backend)} on {escape(report.device)}</h1>",
        f'<p class="sub">{escape(report.distribution)}</p>',
        _verdict(report),
        _levels(report),
        _extensions(report),
        _difference(report, baseline),
        _listing("Failures", report.rows, ("failed", "unexpected_pass")),
        _listing("Exceptions", report.rows, ("excused",)),
        _problems(report),
        "<h2>Headroom by operator and dtype</h2>",
        _legend(),
        _matrix(report.rows),
        _closest(report.rows),
        _facts(report),
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
    text = f'<p class="verdict {kind}">{escape(report.headline)}</p>'
    if report.hardware != "real":
        text += (
            '<p class="verdict warn">Never run on hardware: what computed was '
            f"{escape(report.hardware)} on the host.</p>"
        )
    return text


def _levels(report: Report) -> str:
    verdicts = {verdict.level: verdict for verdict in report.verdicts}
    cards = []
    for level, name in enumerate(_LEVELS):
        verdict = verdicts.get(level)
        rows = [row for row in report.rows if row.level == level and not row.extension]
        kind, said = "plain", "not run"
        if verdict is not None:
            kind = "good" if verdict.is_granted else "bad"
            said = verdict.text.removeprefix(f"level {level}").strip() or "granted"
        tried = [row for row in rows if row.outcome != "unsupported"]
        passed = sum(row.outcome == "passed" for row in tried)
        seconds = sum(row.seconds for row in rows)
        numbers = f"<br>{passed} of {len(tried)} passed, {seconds:.0f} s" if rows else ""
        cards.append(
            f'<div class="card {kind}"><b>{level} {name}</b><span>{escape(said)}{numbers}</span>'
            "</div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _extensions(report: Report) -> str:
    if not report.extensions:
        return ""
    kinds = {"granted": "good", "failed": "bad", "not certifiable": "warn"}
    rows = []
    for verdict in sorted(report.extensions, key=lambda v: (not v.claim, v.name)):
        kind = kinds.get(verdict.outcome, "plain")
        rows.append(
            f"<tr><th>{escape(verdict.name)}</th><td><span class='key {kind}'>"
            f"{escape(verdict.text)}</span></td><td class='by'>{escape(verdict.claim)}</td></tr>"
        )
    note = (
        '<p class="note">Reported apart: none is needed for a level, and no level grants one.</p>'
    )
    return f"<h2>Extensions</h2>{note}<table>{''.join(rows)}</table>"


def _closest(rows: Sequence[Row]) -> str:
    """The tests with the least room: where a failure would begin."""
    measured = [row for row in rows if row.headroom is not None and row.headroom > 0]
    closest = sorted(measured, key=lambda row: row.headroom or 0.0, reverse=True)[:_NUM_CLOSEST]
    if not closest:
        return ""
    lines = []
    for row in closest:
        share = row.headroom or 0.0
        style = f"width:{min(share, 1) * 8:.2f}rem;background:{_colour(share)}"
        bar = f'<span class="bar" style="{style}">'
        lines.append(
            f"<tr><td><code>{escape(row.id)}</code></td><td>{bar}</span> {share:.0%}</td>"
            f'<td class="number">{row.error:.3g} of {row.bound:.3g}</td></tr>'
        )
    return f"<h2>Closest to the bound</h2><table>{''.join(lines)}</table>"


def _colour(share: float) -> str:
    return next((colour for limit, colour, _ in _SCALE if share <= limit), _FAILED)


def _facts(report: Report) -> str:
    facts = {
        "Device": f"{report.device} {report.architecture}",
        "Computed by": "the device" if report.hardware == "real" else report.hardware,
        "Tests": ", ".join(f"{count} {name}" for name, count in report.counts.items()),
        "Run": f"{report.created}, seed {report.seed}, {'' if report.is_sealed else 'un'}sealed",
        "Quire": f"{report.quire_version}, interface {report.interface_version}",
        "Suite": report.suite_hash,
        "Environment": ", ".join(f"{k} {v}" for k, v in report.environment.items()),
    }
    rows = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"<h2>The run</h2><table>{''.join(rows)}</table>"


def _legend() -> str:
    colours = [(colour, text) for _, colour, text in _SCALE]
    colours += [(_FAILED, "failed"), (_EXCUSED, "excused"), (_UNSUPPORTED, "not claimed")]
    marks = (f'<span class="key" style="background:{c}">{t}</span>' for c, t in colours)
    return f'<p class="note">The largest error as a share of its bound. {" ".join(marks)}</p>'


def _matrix(rows: Sequence[Row]) -> str:
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    head = "".join(
        f"<th style='text-align:center'>{escape(dtype or 'any')}</th>" for dtype in dtypes
    )
    groups = [
        (f"level {level}, {name}", [r for r in rows if r.level == level and not r.extension])
        for level, name in enumerate(_LEVELS)
    ]
    groups.append(("extensions", [row for row in rows if row.extension]))
    lines = []
    for title, members in groups:
        if members:
            span = len(dtypes) + 2
            lines.append(f'<tr class="group"><th colspan="{span}">{escape(title)}</th></tr>')
            lines += [_line(op, members, dtypes) for op in dict.fromkeys(r.op for r in members)]
    return f"<table><tr><th></th>{head}<th>served by</th></tr>{''.join(lines)}</table>"


def _line(op: str, rows: Sequence[Row], dtypes: Sequence[str]) -> str:
    cells = (_cell([r for r in rows if (r.op, r.dtype) == (op, d)]) for d in dtypes)
    served = sorted({row.provider for row in rows if row.op == op and row.provider})
    by = escape(", ".join(served))
    return f'<tr><th>{escape(op)}</th>{"".join(cells)}<td class="by">{by}</td></tr>'


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
    lines = _changes(report, baseline)
    body = _table(lines) if lines else '<p class="note">Nothing changed.</p>'
    verdict = baseline.headline
    was = f'<p class="note">Then: {escape(verdict)}, quire {escape(baseline.quire_version)}.</p>'
    return f"<h2>Since {escape(baseline.created)}</h2>{was}{body}"


def _changes(report: Report, baseline: Report) -> list[tuple[str, str]]:
    """What a person would want to know first: outcomes, then errors that grew, then the rest."""
    before = {row.id: row for row in baseline.rows}
    outcomes, grown, new = [], [], []
    for row in report.rows:
        old = before.get(row.id)
        if old is None:
            new.append((row.id, f"not there → {row.outcome}"))
        elif old.outcome != row.outcome:
            outcomes.append((row.id, f"{old.outcome} → {row.outcome}"))
        elif (row.headroom or 0) > 2 * (old.headroom or 0) and (row.headroom or 0) > _NOTABLE:
            grown.append((row.id, f"headroom {old.headroom or 0:.0%} → {row.headroom:.0%}"))
    old_words = {verdict.name: verdict.text for verdict in baseline.extensions}
    words = {verdict.name: verdict.text for verdict in report.extensions}
    extensions = [
        (f"extension {name}", f"{old_words.get(name, 'unknown')} → {words.get(name, 'unknown')}")
        for name in sorted({*words, *old_words})
        if words.get(name) != old_words.get(name)
    ]
    gone = [(name, "no longer there") for name in sorted(set(before) - {r.id for r in report.rows})]
    return [*outcomes, *extensions, *grown, *gone, *new]


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
