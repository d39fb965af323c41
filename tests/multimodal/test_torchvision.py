"""Families that are seen with torchvision alone, in processes that have it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import model_matrix
import pytest
import torchvision_beside
import vision_matrix
from model_matrix import ROOT
from more_vision import MORE
from tiny_image_text import make_tiny_image_text

FAMILIES = [family for family, recipe in MORE.items() if recipe.needs_torchvision]
RESULTS = json.loads((ROOT / vision_matrix.DEFAULT_JSON).read_text())["results"]
SEEING = (
    "import sys, torchvision_beside; torchvision_beside.use(); import pytest; "
    "sys.exit(pytest.main(sys.argv[1:]))"
)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_family_that_wants_torchvision_answers_text_without_it():
    """What is missing costs the images alone, and the refusal says what to install."""
    row = model_matrix.run_architecture(
        "cohere2_vision", make_tiny_image_text, vision_matrix.image_refusal
    )
    assert row["status"] == "exact", row
    assert "pip install torchvision" in row["also"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_that_wants_torchvision_is_exact_beside_it(family):
    """Chunks, prefixes and preemption as of all others, where torchvision can be had."""
    if not torchvision_beside.is_installed():
        pytest.skip("torchvision is not installed; scripts/install puts it beside the tests")
    assert RESULTS[family]["status"] == "exact"
    tests = ROOT / "tests" / "multimodal"
    asked = ["-q", "-p", "no:cacheprovider", "-m", "slow or not slow", "-rs"]
    chosen = [
        f"{tests}/test_seeing.py::{name}[{family}]"
        for name in (
            "test_generate_images_in_chunks_and_together_as_transformers",
            "test_generate_image_with_a_full_cache_is_preempted_and_exact",
        )
    ]
    done = subprocess.run(
        [sys.executable, "-c", SEEING, *asked, *chosen],
        cwd=tests, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout, done.stdout[-4000:]


@pytest.mark.slow
def test_decoder_that_reads_what_a_projector_made_is_exact(tmp_path):
    """PP-FormulaNet's tower makes maps; its decoder reads the rows that they become."""
    if not torchvision_beside.is_installed():
        pytest.skip("torchvision is not installed; scripts/install puts it beside the tests")
    report = tmp_path / "rows.json"
    script = ROOT / "scripts" / "vision_matrix.py"
    subprocess.run(
        [sys.executable, script, "--json", report, "pp_formulanet"],
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    row = json.loads(report.read_text())["results"]["pp_formulanet"]
    assert row["status"] == RESULTS["pp_formulanet"]["status"] == "exact", row
