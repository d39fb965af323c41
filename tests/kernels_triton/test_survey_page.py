"""The page of compiled kernels says what the survey's file says, and the file holds all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from quire import kernels_cuda, kernels_rocm
from quire.kernels_triton.survey import main
from quire.kernels_triton.survey_page import render_survey

DOCS = Path(__file__).parents[2] / "docs"
FILE = DOCS / "reports" / "kernels.json"
TABLES = {p.stem: p for m in (kernels_cuda, kernels_rocm) for p in m.TABLES.glob("*.json")}


@pytest.fixture(scope="module")
def data():
    return json.loads(FILE.read_text(encoding="utf-8"))


def kernel(**changes):
    row = {
        "name": "8/8 heads of 64: decode_kernel",
        "target": "sm_1",
        "registers": 100,
        "spill_bytes": 0,
        "shared_bytes": 2048,
        "matrix_instructions": 4,
        "row": "decode",
        "allowed_spill_bytes": 0,
        "wants_matrix": True,
        "findings": [],
    }
    return {**row, **changes}


def survey_of(*rows):
    origin = {"shared_bytes": 65536, "triton": "3", "torch": "2", "date": "d", "sources": "s"}
    return {"targets": {"sm_1": origin}, "kernels": list(rows)}


def test_page_is_made_from_the_file_alone(data):
    """Nobody writes a number by hand."""
    page = (DOCS / "kernels.md").read_text(encoding="utf-8")
    assert page == render_survey(data), "run: make kernels TABLES="


def test_file_holds_every_architecture_and_says_where_it_is_from(data):
    """Each table was compiled, with a compiler and on a day that are named, and kept its word."""
    assert set(data["targets"]) == set(TABLES)
    for name, origin in data["targets"].items():
        assert {"triton", "torch", "date", "sources"} <= set(origin)
        own = [row for row in data["kernels"] if row["target"] == name]
        assert len(own) > 60
        assert not [row["name"] for row in own if row.get("findings")]
        assert all(row["shared_bytes"] <= origin["shared_bytes"] for row in own)
        assert all(row["matrix_instructions"] > 0 for row in own if row.get("wants_matrix"))
        assert all(row["spill_bytes"] <= row.get("allowed_spill_bytes", 0) for row in own)


def test_page_shows_what_breaks_a_promise_and_what_a_table_allows():
    """A spill and a kernel without matrix units are seen, not averaged."""
    page = render_survey(
        survey_of(
            kernel(),
            kernel(name="prefill", row="prefill", spill_bytes=64, allowed_spill_bytes=128),
            kernel(name="bad", matrix_instructions=0, findings=["has no matrix instructions"]),
        )
    )
    assert "| sm_1 | 3 | 1 | 2 | 2 of 3 that should | 2048 of 65536 bytes |" in page
    assert "| sm_1 | `prefill` | 64 | 128 |" in page
    assert "| sm_1 | `bad` | has no matrix instructions |" in page
    assert "| `decode` | 2: 100, 2 |" in page


def test_page_without_tables_is_written_from_the_file(tmp_path):
    """Nothing is compiled for it; a page without a file is refused."""
    file, page = tmp_path / "kernels.json", tmp_path / "kernels.md"
    file.write_text(json.dumps(survey_of(kernel())), encoding="utf-8")
    assert main(["--json", str(file), "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == render_survey(survey_of(kernel()))
    for wrong in ([], ["--page", str(page)]):
        with pytest.raises(SystemExit):
            main(wrong)
