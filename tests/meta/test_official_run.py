"""The official run: sealed, strict about excuses, and hard to lie with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

pytest.importorskip("torch")

from quire.conformance.expectations import apply_expectations, read_expectations
from quire.conformance.page import render
from quire.conformance.records import Expectation, RawRun, Report, Row, checksum_of
from quire.conformance.reporting import make_report, read_report, write_report
from quire.conformance.run import run_suite
from quire.conformance.vendor_cost import cost_of
from quire.conformance.verdicts import judge, manifest_of
from quire.conformance.verification import verify
from quire.core.errors import ConfigError
from quire.core.serving.cli import conformance as conformance_command
from quire.core.serving.cli.application import application

FIRST = "test_l0_boots.py::test_memory_is_sane"
LINE = Expectation(
    test=FIRST, kind="known-bug", issue="https://example.org/1", reason="counts pages", until="99"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sealed run of level 0 on the CPU, from a folder in which everything is hostile."""
    hostile = tmp_path_factory.mktemp("hostile")
    (hostile / "conftest.py").write_text(
        "def pytest_collection_modifyitems(items):\n    items.clear()\n"
    )
    (hostile / "pytest.ini").write_text("[pytest]\naddopts = --collect-only -k nothing\n")
    target = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hostile)
        patch.setenv("PYTEST_ADDOPTS", "--collect-only")
        patch.setenv("PYTEST_PLUGINS", "a_plugin_that_is_not_there")
        run_suite("cpu", level=0, folder=target, seed=5, is_quiet=True)
    return target


@pytest.fixture
def report(folder):
    return read_report(folder / "report.json")


def rewrite(report: Report, tmp_path, **changes):
    """The report with changes, as somebody would write it by hand; its checksum is the old one."""
    path = tmp_path / "report.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(report, **changes)))
    return path


def rows(*outcomes: str) -> list[Row]:
    ids = manifest_of(0)
    return [
        Row(id=name, level=0, op="device", dtype="", outcome=outcome)
        for name, outcome in zip(ids, (*outcomes, *["passed"] * len(ids)), strict=False)
    ]


def test_sealed_run_hostile_conftest_ini_and_addopts_change_nothing(report):
    """What lies around the user cannot empty, skip or colour an official run."""
    assert sorted(row.id for row in report.rows) == sorted(manifest_of(0))
    assert report.is_sealed
    assert report.is_passed, [row for row in report.rows if row.outcome != "passed"]
    assert report.headline == "cpu: level 0"


def test_plain_pytest_hostile_conftest_is_obeyed_and_so_it_is_not_official(tmp_path):
    """The same files do change plain pytest, or the test above would show nothing."""
    (tmp_path / "conftest.py").write_text(
        "def pytest_collection_modifyitems(items):\n    items.clear()\n"
    )
    (tmp_path / "test_one.py").write_text("def test_one():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "no tests ran" in done.stdout, done.stdout


def test_verify_report_as_it_was_written_finds_nothing(folder):
    """An honest report verifies."""
    assert verify(folder / "report.json") == []


def test_verify_outcome_edited_by_hand_is_modified(report, tmp_path):
    """The checksum is over every row."""
    edited = [msgspec.structs.replace(report.rows[0], seconds=0.5), *report.rows[1:]]
    assert any("modified" in finding for finding in verify(rewrite(report, tmp_path, rows=edited)))


def test_verify_new_checksum_over_a_lie_is_dishonest(report, tmp_path):
    """Who recomputes the checksum still has to make verdicts, counts and bounds agree."""
    failed = msgspec.structs.replace(report.rows[0], outcome="failed")
    lie = msgspec.structs.replace(report, rows=[failed, *report.rows[1:]], checksum="")
    findings = verify(rewrite(lie, tmp_path, checksum=checksum_of(lie)))
    assert any("verdicts do not follow" in finding for finding in findings), findings
    assert any("counts do not follow" in finding for finding in findings), findings


def test_verify_passed_row_above_its_bound_is_dishonest(report, tmp_path):
    """A pass is a pass by the numbers that stand beside it."""
    row = msgspec.structs.replace(report.rows[0], error=2.0, bound=1.0, headroom=2.0)
    lie = msgspec.structs.replace(report, rows=[row, *report.rows[1:]], checksum="")
    findings = verify(rewrite(lie, tmp_path, checksum=checksum_of(lie)))
    assert findings == [f"dishonest: {row.id} passed with an error above its bound"]


def test_verify_failure_passed_off_as_unsupported_is_dishonest(report, tmp_path):
    """What is excused follows from the claims in the same report."""
    row = msgspec.structs.replace(report.rows[0], outcome="unsupported", reason="not today")
    rows = [row, *report.rows[1:]]
    counts = {"passed": len(rows) - 1, "unsupported": 1}
    lie = msgspec.structs.replace(report, rows=rows, counts=counts, checksum="")
    findings = verify(rewrite(lie, tmp_path, checksum=checksum_of(lie)))
    assert findings == [f"dishonest: {row.id} is unsupported; its claims say otherwise"]


def test_verify_missing_row_is_incomplete(report, tmp_path):
    """A test that was left out is missed by the manifest."""
    short = msgspec.structs.replace(report, rows=report.rows[1:], checksum="")
    findings = verify(rewrite(short, tmp_path, checksum=checksum_of(short)))
    assert any("incomplete: 1 tests" in finding for finding in findings), findings


def test_verify_unsealed_report_says_so(report, tmp_path):
    """A run under plain pytest certifies nothing."""
    raw = RawRun(seed=1, level=0, rows=report.rows)
    write_report(make_report("cpu", raw, is_sealed=False), tmp_path)
    (finding,) = verify(tmp_path / "report.json")
    assert "unsealed" in finding


def test_verify_command_edited_report_ends_with_one(report, folder, tmp_path):
    """Scripts see it by the exit status."""
    good = CliRunner().invoke(application, ["conformance", "verify", str(folder / "report.json")])
    assert (good.exit_code, "honest" in good.output) == (0, True), good.output
    edited = rewrite(report, tmp_path, device="another")
    bad = CliRunner().invoke(application, ["conformance", "verify", str(edited)])
    assert (bad.exit_code, "modified" in bad.output) == (1, True), bad.output


def test_read_report_another_schema_or_no_report_says_what_it_reads(report, tmp_path):
    """A report of another time is refused, not misread."""
    with pytest.raises(ConfigError, match=r"schema 0\.9; this quire reads 1\.1"):
        read_report(rewrite(report, tmp_path, schema_version="0.9"))
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ConfigError, match="no conformance report"):
        read_report(tmp_path / "none.json")


def test_expectations_failure_as_expected_is_excused_and_counted():
    """Level N with k exceptions, never just level N."""
    raw = [
        msgspec.structs.replace(row, outcome="failed") if row.id == FIRST else row for row in rows()
    ]
    excused, problems = apply_expectations(raw, [LINE], manifest=set(manifest_of(2)), version="1.0")
    assert problems == []
    (verdict,) = judge(excused, level=0, problems=problems)
    assert (verdict.is_granted, verdict.text) == (True, "level 0 with 1 exception")


@pytest.mark.parametrize(
    ("changes", "version", "words"),
    [
        ({"test": "test_l0_boots.py::test_gone"}, "1.0", "no test of the suite has this id"),
        ({"until": "1.6"}, "1.6", "expired with version 1.6"),
    ],
    ids=["unmatched", "expired"],
)
def test_expectations_stale_line_denies_the_level(changes, version, words):
    """An excuse for nothing is an error."""
    line = msgspec.structs.replace(LINE, **changes)
    raw = [
        msgspec.structs.replace(row, outcome="failed") if row.id == line.test else row
        for row in rows()
    ]
    result, problems = apply_expectations(
        raw, [line], manifest=set(manifest_of(2)), version=version
    )
    assert any(words in problem for problem in problems), problems
    assert not judge(result, level=0, problems=problems)[0].is_granted


def test_expectations_unexpected_pass_denies_the_level():
    """A repaired bug takes its excuse along."""
    result, _ = apply_expectations(rows(), [LINE], manifest=set(manifest_of(2)), version="1.0")
    (row,) = (row for row in result if row.id == FIRST)
    assert (row.outcome, "remove the line" in row.reason) == ("unexpected_pass", True)
    assert not judge(result, level=0, problems=[])[0].is_granted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[expect]]\ntest = 'a'\n", "missing required field"),
        ("[[skip]]\ntest = 'a'\n", "only \\[\\[expect\\]\\] is known"),
        ("[[expect]\n", "expectations"),
        (
            "[[expect]]\ntest='a'\nkind='hopeless'\nissue='i'\nreason='r'\nuntil='1'\n",
            "'hopeless' is none of",
        ),
        (
            "[[expect]]\ntest='a'\nkind='known-bug'\nissue=' '\nreason='r'\nuntil='1'\n",
            "needs a reason and an issue",
        ),
    ],
)
def test_read_expectations_bad_file_names_what_is_wrong(text, words, tmp_path):
    """No verb but expect, and each with its reason."""
    path = tmp_path / "conformance.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_expectations(path)


def test_run_command_with_expectations_counts_them_in_the_first_line(tmp_path):
    """A line for a test that passes denies the level, with exit status 1."""
    path = tmp_path / "conformance.toml"
    path.write_text(
        f"[[expect]]\ntest='{FIRST}'\nkind='known-bug'\nissue='i'\nreason='r'\nuntil='99'\n"
    )
    arguments = [
        "conformance",
        "run",
        "--backend",
        "cpu",
        "--level",
        "0",
        "--expectations",
        str(path),
    ]
    done = CliRunner().invoke(application, arguments)
    assert done.exit_code == 1, done.output
    assert "level 0 not granted: 1 failed" in done.output


def test_run_unknown_backend_says_what_is_installed():
    """A typing error costs no run."""
    done = CliRunner().invoke(application, ["conformance", "run", "--backend", "nonesuch"])
    assert done.exit_code != 0
    with pytest.raises(ConfigError, match="installed backends are"):
        run_suite("nonesuch", level=0)


def test_list_command_prints_the_manifest():
    """What is listed is what is run."""
    done = CliRunner().invoke(application, ["conformance", "list", "--level", "1"])
    assert done.output.split() == manifest_of(1)


def test_page_shows_verdict_failures_and_the_difference_to_a_baseline(report):
    """One file that a person reads, with nothing fetched."""
    broken = msgspec.structs.replace(report.rows[3], outcome="failed", reason="is <b>wrong</b>")
    worse = msgspec.structs.replace(report, rows=[*report.rows[:3], broken, *report.rows[4:]])
    page = render(worse, report)
    assert "is &lt;b&gt;wrong" in page
    assert "passed → failed" in page
    assert "<script" not in page
    assert "http" not in page.replace("https://example.org", "")


def test_vendor_cost_counts_lines_imports_and_patches(tmp_path, monkeypatch):
    """An assignment onto an object of Quire's is found in the syntax tree."""
    (tmp_path / "acme_quire_cost.py").write_text(
        "# a comment\n"
        "from quire.core import interface\n"
        "from quire.core.interface import Backend\n"
        "\n"
        "interface.NULL_BLOCK = 7\n"
        "setattr(Backend, 'name', 'x')\n"
        "mine = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cost = cost_of("acme_quire_cost:Acme")
    assert (cost.files, cost.lines_of_code) == (1, 5)
    assert cost.quire_modules == ["quire.core", "quire.core.interface"]
    assert cost.assignments == ["acme_quire_cost.py:5", "acme_quire_cost.py:6"]


def test_judge_level_of_which_nothing_can_be_tried_is_not_granted_alone():
    """A device that claims nothing passes nothing."""
    unsupported = [
        msgspec.structs.replace(row, outcome="unsupported", reason="not claimed") for row in rows()
    ]
    (verdict,) = judge(unsupported, level=0, problems=[])
    assert not verdict.is_granted
    assert "nothing of it can be tried" in verdict.text


@pytest.mark.slow
def test_run_of_level_3_is_granted_to_an_asynchronous_device(tmp_path):
    """All levels, sealed, on two workers: what a vendor runs."""
    report = run_suite("sim", level=3, workers=2, folder=tmp_path, is_quiet=True)
    assert report.headline == "sim: level 3", [r for r in report.rows if r.outcome == "failed"]
    assert not verify(tmp_path / "report.json")


@pytest.mark.slow
def test_run_in_parallel_gives_the_rows_of_a_serial_run(report):
    """The seed and the id decide the data: neither order nor worker has a say."""
    parallel = run_suite("cpu", level=0, workers=2, seed=report.seed, is_quiet=True)
    facts = [[(row.id, row.outcome, row.error) for row in r.rows] for r in (report, parallel)]
    assert facts[0] == facts[1]
    assert {row.worker for row in parallel.rows} == {"gw0", "gw1"}


def test_command_without_the_extra_says_how_to_install_it(monkeypatch):
    """Nobody reads a traceback for a missing package."""
    monkeypatch.setattr(conformance_command, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "quire\[conformance,torch\]"'):
        conformance_command.list_tests(level=0)


def test_docs_name_tests_and_options_that_there_are():
    """The page for vendors is held to the suite."""
    page = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text()
    ids = set(re.findall(r'"(test_\w+\.py::\S+)"', page))
    assert ids
    assert ids <= set(manifest_of(3))
    shown = CliRunner().invoke(
        application, ["conformance", "run", "--help"], env={"COLUMNS": "200"}
    )
    commands = re.findall(r"quire conformance run (.*)", page)
    options = {option for command in commands for option in re.findall(r"--?[a-z]+", command)}
    assert options >= {"--backend", "--level", "-n", "--report"}
    assert all(option in shown.output for option in options), shown.output
