"""The workflow that certifies devices asks for things that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
FILE = ROOT / ".github" / "workflows" / "conformance.yml"


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def entries(workflow, job):
    return workflow["jobs"][job]["strategy"]["matrix"]["include"]


def test_workflow_has_a_job_for_each_device(workflow):
    """Interpreted on the host, real on machines of their owners, and the examples for vendors."""
    hosted = {(e["backend"], e["how"]) for e in entries(workflow, "device")}
    assert hosted >= {("cpu", "native")} | {(b, "interpreted") for b in ("cuda", "rocm", "xpu")}
    assert {e["backend"] for e in entries(workflow, "hardware")} == {"cuda", "rocm", "xpu"}
    assert {e["backend"] for e in entries(workflow, "vendor")} >= {"acme"}
    assert "self-hosted" in workflow["jobs"]["hardware"]["runs-on"]


def test_workflow_every_job_runs_verifies_and_uploads(workflow):
    """A report that nobody can read certifies nothing; one that failed is uploaded too."""
    for name, job in workflow["jobs"].items():
        steps = job["steps"]
        runs = " ".join(str(step.get("run", "")) for step in steps)
        assert "quire conformance run --backend ${{ matrix.backend }}" in runs, name
        assert "quire conformance verify report/report.json" in runs, name
        (upload,) = [s for s in steps if str(s.get("uses", "")).startswith("actions/upload")]
        assert upload["if"] == "${{ always() }}", name


def test_workflow_interprets_kernels_where_there_is_no_hardware(workflow):
    """An interpreted entry that forgot the interpreter would look for a device."""
    for entry in entries(workflow, "device"):
        assert entry["interpret"] == ("1" if entry["how"] == "interpreted" else "0"), entry


def test_workflow_names_options_and_matrix_keys_that_there_are(workflow):
    """A typing error in a workflow is found here and not at night."""
    from typer.testing import CliRunner

    from quire.core.serving.cli.application import application

    shown = (
        CliRunner()
        .invoke(application, ["conformance", "run", "--help"], env={"COLUMNS": "200"})
        .output
    )
    for name, job in workflow["jobs"].items():
        keys = set.intersection(*(set(e) for e in entries(workflow, name)))
        used = set(re.findall(r"matrix\.(\w+)", str(job)))
        assert used <= keys, (name, used - keys)
        for step in job["steps"]:
            for command in re.findall(r"quire conformance run (.*)", str(step.get("run", ""))):
                options = set(re.findall(r"(?<!\S)--?[a-z]+", command))
                assert all(option in shown for option in options), options


def test_workflow_levels_are_levels_of_the_suite(workflow):
    """No entry asks for a level that one device cannot reach."""
    from quire.conformance.cases import HIGHEST_LEVEL

    every = [e for job in workflow["jobs"] for e in entries(workflow, job)]
    assert all(0 <= entry["level"] <= HIGHEST_LEVEL for entry in every)
