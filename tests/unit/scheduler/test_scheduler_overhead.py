"""The cost of the scheduler stays far below that of a step on any device."""

from __future__ import annotations

import json

from quire.benchmarks.scheduler_overhead import main, measure


def test_step_of_64_decodes_costs_the_scheduler_less_than_half_a_millisecond():
    """The engine must pass 100,000 tokens a second on a device that takes no time.

    The benchmark shows the real figure, far below; a loop over the cache or the queue that slips into the path of every
    token would show here.
    """
    assert measure(64, 300, 1).total_median_us < 500


def test_benchmark_prints_a_table_and_writes_its_figures(capsys, tmp_path):
    """The documented command works, with a sliding group beside the full one."""
    main(["--running", "3", "--groups", "1", "2", "--steps", "40", "--json", str(tmp_path / "f")])
    assert len(capsys.readouterr().out.splitlines()) == 4
    rows = json.loads((tmp_path / "f").read_text())
    assert [(row["num_running"], row["num_groups"]) for row in rows] == [(3, 1), (3, 2)]
