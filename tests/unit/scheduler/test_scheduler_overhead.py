"""The cost of the scheduler stays far below that of a step on any device."""

from __future__ import annotations

import cProfile
import json

from quire.benchmarks.scheduler_overhead import answer, main, make_scheduler


def test_step_of_64_decodes_calls_few_functions_for_each_request():
    """A loop over the cache or the queue on the path of every token shows as calls.

    Calls are counted, not timed: the count is the same on every machine. The benchmark times.
    """
    num_running, num_steps = 64, 32
    scheduler = make_scheduler(num_running, num_steps, 1)
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(num_steps):
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.update(batch, answer(batch, 7))
    profile.disable()
    num_calls = sum(entry.callcount for entry in profile.getstats())
    assert num_calls / (num_running * num_steps) < 20


def test_benchmark_prints_a_table_and_writes_its_figures(capsys, tmp_path):
    """The documented command works, with a sliding group beside the full one."""
    main(["--running", "3", "--groups", "1", "2", "--steps", "40", "--json", str(tmp_path / "f")])
    assert len(capsys.readouterr().out.splitlines()) == 4
    rows = json.loads((tmp_path / "f").read_text())
    assert [(row["num_running"], row["num_groups"]) for row in rows] == [(3, 1), (3, 2)]
