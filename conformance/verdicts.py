"""Which levels a set of rows grants: a pure function, so that anybody can check it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from quire.conformance.cases import all_cases, extension_cases
from quire.conformance.records import Row, Verdict

_FAILURES = ("failed", "unexpected_pass")
_TRIED = ("passed", "excused", *_FAILURES)


def manifest_of(level: int) -> list[str]:
    """The ids that a run up to `level` consists of, extensions left out."""
    return [case.id for case in all_cases(level)]


def manifest_with(level: int, extensions: Collection[str]) -> list[str]:
    """The ids of a run up to `level` that also tries these extensions."""
    return manifest_of(level) + [case.id for case in extension_cases(extensions)]


def judge(rows: Sequence[Row], *, level: int, problems: Sequence[str]) -> list[Verdict]:
    """One verdict for each level: granted iff its ids are complete and none failed.

    A level of which a device can try nothing is not granted by itself; for a device that torch does
    not own, level 2 stands for the operators of level 1.
    """
    of_levels = [row for row in rows if not row.extension]
    return [_judge_level(of_levels, upto, problems) for upto in range(level + 1)]


def _judge_level(rows: Sequence[Row], level: int, problems: Sequence[str]) -> Verdict:
    counts = Counter(row.outcome for row in rows if row.level <= level)
    failures = sum(counts[outcome] for outcome in _FAILURES)
    num_missing = len(set(manifest_of(level)) - {row.id for row in rows})
    exceptions = counts["excused"]
    is_tried = any(row.level == level and row.outcome in _TRIED for row in rows)
    findings = [
        f"{number} {what}"
        for number, what in (
            (failures, "failed"),
            (num_missing, "missing"),
            (len(problems), "problems with expectations or ids"),
        )
        if number
    ]
    findings += [] if is_tried else ["nothing of it can be tried on this device"]
    plural = "" if exceptions == 1 else "s"
    with_exceptions = f" with {exceptions} exception{plural}" if exceptions else ""
    text = f"level {level}{with_exceptions}"
    if findings:
        text = f"level {level} not granted: {', '.join(findings)}{with_exceptions}"
    return Verdict(level=level, is_granted=not findings, num_exceptions=exceptions, text=text)
