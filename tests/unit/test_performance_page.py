"""The page of figures is made from records, and is up to date."""

from __future__ import annotations

import json
from pathlib import Path

from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.report import PAGE, make_page


def test_page_in_the_tree_equals_what_its_records_give() -> None:
    """No figure is written by hand."""
    assert PAGE.read_text() == make_page()


def test_page_shows_medians_and_ratios_run_by_run(tmp_path: Path) -> None:
    """A ratio is the median of ratios, not a ratio of medians."""
    ours = Measurement(work="w", subject="a", unit="tokens/s", values=(10.0, 90.0, 20.0))
    theirs = Measurement(work="w", subject="b", unit="tokens/s", values=(5.0, 10.0, 20.0))
    record = Record(name="trial", settings={"rounds": 3}, measurements=[ours, theirs])
    record.ratios.append(paired_ratio("w", ours, theirs))
    path = record.write(tmp_path / "trial.json")
    assert json.loads(path.read_text())["ratios"][0]["median"] == 2.0
    page = make_page(tmp_path)
    assert "| w | a | 20.00 | 10.00 | 90.00 | tokens/s |" in page
    assert "| w | a / b | 2.00 | 1.00 | 9.00 |" in page
