"""The support matrix says what the reports say, and no report was touched."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from quire.conformance.extensions import judge_extensions
from quire.conformance.matrix import render_matrix
from quire.conformance.records import Report, checksum_of
from quire.conformance.reporting import read_report
from quire.conformance.verdicts import judge
from quire.core.interface import Capabilities
from quire.core.serving.cli.application import application

DOCS = Path(__file__).parents[2] / "docs"
PATHS = sorted((DOCS / "reports" / "conformance").glob("*.json"))


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return [read_report(path) for path in PATHS]


def test_support_page_is_made_from_the_reports_alone(reports):
    """Nobody writes a cell by hand."""
    assert (DOCS / "support.md").read_text(encoding="utf-8") == render_matrix(reports), (
        "run: quire conformance matrix docs/reports/conformance/*.json -o docs/support.md"
    )


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_report_is_sealed_and_as_it_was_written(path):
    """A report that was edited, or made by plain pytest, supports nothing."""
    report = read_report(path)
    assert report.is_sealed
    assert report.checksum == checksum_of(report)
    assert all(not (v.is_granted and report.missing) for v in report.verdicts)


def test_support_page_marks_what_never_ran_on_hardware(reports):
    """An interpreter's word is not a device's."""
    imitated = msgspec.structs.replace(reports[0], hardware="interpreted", backend="board")
    page = render_matrix([*reports, imitated])
    assert "board ¹" in page
    assert "¹ interpreted; **never run on hardware**" in page
    assert "| interpreted |" in page


def test_reports_of_interpreted_kernels_say_so(reports):
    """What has run in Triton's interpreter alone does not stand there as a device's."""
    for path, report in zip(PATHS, reports, strict=True):
        is_interpreted = path.stem.endswith("-interpreted")
        assert is_interpreted == (report.hardware == "interpreted"), path


def test_support_page_shows_failures_exceptions_and_claims_without_checks(reports):
    """What is not granted is not left out."""
    (report, *_) = reports
    first = next(row for row in report.rows if row.op == "rms_norm" and row.dtype == "float32")
    rows = [
        msgspec.structs.replace(row, outcome="failed") if row.id == first.id else row
        for row in report.rows
    ]
    claims = report.capabilities | {"extensions": {"acme:warp": "bends numbers"}}
    broken = msgspec.structs.replace(
        report,
        rows=rows,
        verdicts=judge(rows, level=report.level, problems=[]),
        extensions=judge_extensions(
            rows, tried=[], capabilities=msgspec.convert(claims, type=Capabilities)
        ),
    )
    page = render_matrix([broken])
    assert "**failed**" in page
    assert "`acme:warp` | claimed, not certifiable by this suite" in page


def test_matrix_command_refuses_an_edited_report(reports, tmp_path):
    """A lie does not reach the documentation."""
    edited = tmp_path / "report.json"
    lie = msgspec.structs.replace(reports[0], device="something better")
    edited.write_bytes(msgspec.json.encode(lie))
    done = CliRunner().invoke(application, ["conformance", "matrix", str(edited)])
    assert done.exit_code == 2
    written = tmp_path / "support.md"
    arguments = ["conformance", "matrix", *map(str, PATHS), "-o", str(written)]
    good = CliRunner().invoke(application, arguments)
    assert good.exit_code == 0, good.output
    assert written.read_text(encoding="utf-8") == render_matrix(reports)
