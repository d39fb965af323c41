"""The matrix of image-text-to-text models: its page, and rows of it that are run again."""

from __future__ import annotations

import json

import matrix_pages
import pytest
import vision_matrix
from model_matrix import ROOT

RESULTS = json.loads((ROOT / vision_matrix.DEFAULT_JSON).read_text())
SERVED = ("exact",)


def test_page_holds_the_results_of_the_file():
    """Nobody edits the table by hand."""
    page = (ROOT / "docs" / "multimodal.md").read_text()
    table = matrix_pages.render(RESULTS["results"], RESULTS["transformers"], vision_matrix.LABELS)
    assert matrix_pages.with_table(page, table) == page


def test_no_architecture_gives_wrong_tokens():
    """What runs is exact, and what is not is refused or has its cause."""
    assert not [name for name, row in RESULTS["results"].items() if row["status"] == "wrong"]
    unexplained = [
        name
        for name, row in RESULTS["results"].items()
        if row["status"] not in (*SERVED, "exact_uncached") and not row.get("detail")
    ]
    assert not unexplained


@pytest.mark.parametrize("name", ["llava", "molmo2"])
def test_rows_run_again_are_as_written(name):
    """One that is served with images, and one that refuses them by name."""
    row = vision_matrix.run_vision(name)
    assert row["status"] == RESULTS["results"][name]["status"], row


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["aria", "fuyu", "gemma3", "glm5_next", "idefics2", "llava_next", "mistral3", "paligemma"],
)
def test_more_rows_run_again_are_as_written(name):
    """The same for architectures that differ in the way they run."""
    row = vision_matrix.run_vision(name)
    assert row["status"] == RESULTS["results"][name]["status"], row


def test_load_model_that_answers_no_text_alone_is_refused():
    """A captioner wants an image with every text: it is refused at load, with what it wants."""
    row = vision_matrix.run_vision("blip")
    assert row["status"] == "refused"
    assert "pixel_values" in row["detail"]
