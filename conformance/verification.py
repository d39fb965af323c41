"""Is a report complete, unmodified and honest? From the file and the installed suite alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec

from quire.conformance.cases import all_cases, extension_cases
from quire.conformance.extensions import judge_extensions
from quire.conformance.records import Report, Row, checksum_of
from quire.conformance.reporting import problems_of_ids, read_report, suite_hash
from quire.conformance.verdicts import judge, manifest_with
from quire.core.interface import Capabilities


def verify(path: Path) -> list[str]:
    """Everything that is wrong with a report; empty: nothing.

    Raises: ConfigError if it cannot be read as one.
    """
    return list(_findings(read_report(path)))


def _findings(report: Report) -> Iterator[str]:
    if report.checksum != checksum_of(report):
        yield "modified: the checksum does not fit the content; the file was edited after the run"
    if not report.is_sealed:
        yield "unsealed: it was made by plain pytest, not by `quire conformance run`"
    if report.suite_hash != suite_hash():
        yield (
            "another suite: the files of the suite that made it are not those installed here "
            f"(report of quire {report.quire_version}), so the rest cannot be told; verify it with "
            "the quire that made it"
        )
        return
    manifest = manifest_with(report.level, report.extensions_tried)
    missing = sorted(set(manifest) - {row.id for row in report.rows})
    if missing:
        yield f"incomplete: {len(missing)} tests of level {report.level} are missing: {missing[:3]}"
    if missing != report.missing:
        yield "dishonest: the list of missing tests is not what its rows say"
    yield from problems_of_ids(report.rows, manifest)
    if judge(report.rows, level=report.level, problems=report.problems) != report.verdicts:
        yield "dishonest: the verdicts do not follow from the rows"
    claims = msgspec.convert(report.capabilities, type=Capabilities)
    said = judge_extensions(report.rows, tried=report.extensions_tried, capabilities=claims)
    if said != report.extensions:
        yield "dishonest: the verdicts on extensions do not follow from the rows and the claims"
    if dict(Counter(row.outcome for row in report.rows)) != report.counts:
        yield "dishonest: the counts do not follow from the rows"
    yield from _excuse_findings(report, claims)
    excused = {line.test for line in report.expectations}
    for row in report.rows:
        yield from _row_findings(row, excused)


def _excuse_findings(report: Report, claims: Capabilities) -> Iterator[str]:
    """Rows that are unsupported although the claims in the report do not excuse them."""
    cases = {case.id: case for case in (*all_cases(report.level), *extension_cases())}
    for row in report.rows:
        case = cases.get(row.id)
        if case is None or row.outcome != "unsupported":
            continue
        if not case.reason_against(claims, is_torch=report.is_torch):
            yield f"dishonest: {row.id} is {row.outcome}; its claims say otherwise"


def _row_findings(row: Row, excused: set[str]) -> Iterator[str]:
    if row.outcome == "passed" and row.headroom is not None and row.headroom > 1:
        yield f"dishonest: {row.id} passed with an error above its bound"
    if row.outcome == "excused" and row.id not in excused:
        yield f"dishonest: {row.id} is excused by no expectation"
    if row.outcome == "unsupported" and not row.reason:
        yield f"dishonest: {row.id} is unsupported without a reason"
