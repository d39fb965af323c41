"""The search behind `quire tune`, with kernels that do nothing and a timer that is told the truth.

What a candidate costs is a formula of its numbers, so the best one is known.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from quire.kernels_triton.launch import TABLES, DeviceLauncher, LaunchEntry, read_table
from quire.kernels_triton.tuning import tune, write_table
from quire.kernels_triton.tuning_work import Work, works

PORTABLE = read_table(TABLES / "portable.json")
TUNED = {
    *("decode", "prefill", "splits", "latent_decode", "latent_prefill", "experts_up"),
    *("experts_down", "rms_norm", "gated_activation", "quantized_linear", "float8_linear"),
}


@pytest.fixture
def launches(monkeypatch):
    """Rows of the launches that host functions ask for, in order; nothing runs."""
    seen: list[LaunchEntry] = []

    def start(self, kernel, grid, arguments, constants, entry):
        seen.append(entry)

    monkeypatch.setattr(DeviceLauncher, "start", start)
    return seen


def work_of(kernel, shapes=1, **facts):
    """A row whose host function asks for its row alone."""

    def run(launcher):
        launcher.start(None, (1,), (), {}, launcher.find(kernel, **facts))

    return Work(label=kernel, kernel=kernel, facts=facts, make=lambda: [run] * shapes)


def timer_of(launches, cost):
    """Seconds by the numbers of the last launch."""

    def time(work):
        work()
        return [cost(launches[-1])] * 3

    return time


def distance(entry, **wanted):
    """1 and more, the further the numbers are from those wanted."""
    have = {**entry.constants, **entry.options}
    return 1.0 + sum(abs(have[name] - value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("prefill", {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}),
        ("decode", {"BLOCK_N": 128, "num_warps": 2, "num_stages": 4}),
        ("latent_decode", {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8}),
        ("experts_up", {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_stages": 4}),
    ],
)
def test_search_finds_the_numbers_that_are_fastest(launches, kernel, wanted):
    """Every number of the row is tried, constants and the compiler's options."""
    found = tune(
        PORTABLE,
        [work_of(kernel, head_size=128, item_size=2, tile=512)],
        timer_of(launches, lambda entry: distance(entry, **wanted)),
    )
    row = found.table.find(kernel, {"head_size": 128, "item_size": 2, "tile": 512})
    assert distance(row, **wanted) == 1.0
    assert found.tuned == [kernel]
    assert len(found.trials) < 40
    assert [trial for trial in found.trials if trial.is_chosen]


def test_row_stays_where_nothing_is_faster_and_others_are_untouched(launches):
    """A table changes in the rows that were tuned and in nothing else."""
    found = tune(PORTABLE, [work_of("splits")], timer_of(launches, lambda entry: 1.0))
    assert found.table == PORTABLE


def test_candidate_that_cannot_run_is_noted_and_not_chosen(launches):
    """A tile that does not fit costs its own trial."""

    def cost(entry):
        if entry.constants["BLOCK_N"] != 32:
            raise RuntimeError("out of resources: shared memory")
        return 1.0

    found = tune(
        PORTABLE,
        [work_of("decode", head_size=128, item_size=2)],
        timer_of(launches, cost),
    )
    assert found.table.find("decode", {"head_size": 128, "item_size": 2}).constants["BLOCK_N"] == 32
    assert [trial for trial in found.trials if trial.seconds is None]


def test_shapes_of_a_row_count_by_their_shares(launches):
    """A long shape that loses a little does not outweigh a short one that gains much."""
    shapes = iter(range(10**6))

    def cost(entry):
        is_long = next(shapes) % 2
        changed = entry.constants["BLOCK"] == 1
        return (1.1 if changed else 1.0) if is_long else (1e-4 if changed else 1e-3)

    table = replace(PORTABLE, entries=(LaunchEntry(kernel="gated_activation"), *PORTABLE.entries))
    first = table.entries[0]
    row = replace(first, constants={"BLOCK": 2, "TILE": 512})
    table = replace(table, entries=(row, *table.entries[1:]))

    def by_tile(entry):
        return cost(replace(entry, constants={"BLOCK": int(entry.constants["TILE"] == 4096)}))

    found = tune(table, [work_of("gated_activation", shapes=2)], timer_of(launches, by_tile))
    assert found.table.entries[0].constants["TILE"] == 4096


def test_what_no_time_or_memory_is_left_for_is_named(launches):
    """A lent machine ends; what was found by then is kept."""
    calls = []

    def is_over():
        calls.append(1)
        return len(calls) > 3

    def fail():
        raise torch.OutOfMemoryError("out of memory")

    big = Work(label="too big", kernel="splits", facts={}, make=fail)
    found = tune(
        PORTABLE,
        [big, work_of("splits"), work_of("decode", head_size=128, item_size=2)],
        timer_of(launches, lambda entry: distance(entry, PROGRAMS_PER_UNIT=4)),
        is_over=is_over,
    )
    assert found.untried == ["too big", "decode"]
    assert found.tuned == ["splits"]


@pytest.mark.parametrize("units", ["", "float8_e4m3fn", "float8_e4m3fnuz"])
def test_every_tuned_kernel_has_work_that_takes_the_row_it_is_for(launches, units):
    """The host function, called with the work's tensors, asks for just that row."""
    seen = set()
    for work in works("cpu", is_dry=True, fp8_units=units):
        row = PORTABLE.find(work.kernel, work.facts)
        launches.clear()
        for run in work.make():
            run(DeviceLauncher(PORTABLE))
        assert row in launches or work.kernel == "splits", work.label
        seen.add(work.kernel)
    assert seen == TUNED


@pytest.mark.parametrize(("units", "num_rows"), [("", 2), ("float8_e4m3fn", 3)])
def test_real_work_finds_rows_of_half_precision(units, num_rows):
    """On a device the rows for two bytes are tuned, for both sizes of heads and both loads.

    Those of 8-bit weights are all that a device can take: with units for few rows, for many whose
    inputs are rounded, and for many whose inputs are kept.
    """
    work = list(works("meta", is_dry=False, fp8_units=units))
    rows = [PORTABLE.find(one.kernel, one.facts) for one in work]
    assert len({id(row) for row in rows if row.kernel == "float8_linear"}) == num_rows
    assert {row.kernel for row in rows} == TUNED
    for kernel, count in (("decode", 2), ("prefill", 2), ("experts_up", 2), ("rms_norm", 3)):
        assert len({id(row) for row in rows if row.kernel == kernel}) == count, kernel
    assert all(row.uses_matrix_units for row in rows if "num_stages" in row.options)


def test_written_table_says_what_was_tuned_and_where_the_rest_is_from(launches, tmp_path):
    """The file can be read again, and the trials stand beside it."""
    found = tune(
        PORTABLE, [work_of("splits")], timer_of(launches, lambda e: distance(e, MIN_TOKENS=1024))
    )
    file = tmp_path / "sm_1.json"
    write_table(found, file, {"method": "test"})
    table = read_table(file)
    assert table.find("splits", {}).constants["MIN_TOKENS"] == 1024
    assert table.provenance["tuned"] == "splits"
    assert "portable" in table.provenance["others"]
    trials = json.loads(file.with_suffix(".trials.json").read_text())
    assert sum(trial["is_chosen"] for trial in trials) == 1
