"""The benchmark of an accelerator, walked from end to end on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest

from quire.backends.torch_accelerator.queue import StreamEvent
from quire.benchmarks import accelerator, accelerator_engine
from quire.benchmarks.accelerator_kernels import Ceiling
from quire.benchmarks.accelerator_targets import judge
from quire.benchmarks.budget import Budget
from quire.benchmarks.recording import Measurement, Ratio, Record


def test_waiting_for_a_device_is_no_work_of_the_host(monkeypatch):
    """Each wait is timed, also one that fails, and nothing stays changed behind it."""
    clock = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(accelerator_engine.time, "perf_counter", lambda: next(clock))
    original = StreamEvent.wait
    fine, failing = StreamEvent(Mock()), StreamEvent(Mock())
    failing._event.synchronize.side_effect = ValueError
    with accelerator_engine._timed_waiting() as waited:
        fine.wait()
        with pytest.raises(ValueError):
            failing.wait()
    assert waited == [2.5, 0.25]
    assert StreamEvent.wait is original


def walk(tmp_path, seconds, share):
    """Every part of the program on a clock that goes by the share of what each says it needs."""
    now, begun = [0.0], []
    record = Record(name="x", settings={})
    ceiling = Ceiling(bytes_per_s=1.0, flops=1.0)
    budget = Budget(seconds=seconds, clock=lambda: now[0], stopping=lambda left: nullcontext())

    def clocked(part):
        def work():
            begun.append(part.name)
            now[0] += part.needs_s * share

        return replace(part, work=work)

    kernels = accelerator._kernel_parts("cuda", None, ceiling, record, is_dry=False)
    engine = accelerator._engine_parts("cuda", tmp_path, ceiling, record, is_dry=False)
    parts = [clocked(part) for part in (*kernels, *engine)]
    budget.run(parts)
    suite = accelerator._suite_part("cuda", record, budget.left_s, is_dry=False)
    budget.run([clocked(suite)])
    return now[0], begun, budget.left_out, [part.name for part in (*parts, suite)]


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("seconds", [0, 60, 150, 300, 540, 900])
def test_program_ends_in_its_time_and_names_what_it_left_out(tmp_path, seconds, share):
    """No part is begun that cannot end, and none is missing without a word."""
    taken, begun, left_out, names = walk(tmp_path, seconds, share)
    assert taken <= seconds
    assert sorted(begun + [line.partition(": ")[0] for line in left_out]) == sorted(names)
    assert all("were left" in line for line in left_out)


def test_whole_program_fits_into_its_nine_minutes_where_parts_take_half_of_what_they_may(tmp_path):
    """A large GPU gets every figure and a suite at level 2."""
    taken, begun, left_out, _ = walk(tmp_path, accelerator._BUDGET_S, 0.5)
    assert left_out == []
    assert begun[-1] == "conformance at level 2"
    assert taken <= 540


def test_suite_is_run_at_the_highest_level_that_fits():
    """A level below it is worth more than none."""
    record = Record(name="x", settings={})
    names = [
        accelerator._suite_part("cuda", record, left_s, is_dry=False).name
        for left_s in (50, 130, 300)
    ]
    assert [name[-1] for name in names] == ["1", "1", "2"]


def run_dry(tmp_path, *options):
    """The command, on tiny shapes in the interpreter, and its record."""
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "quire.benchmarks.accelerator", "--dry-run", *options]
    done = subprocess.run(
        [*command, "--out", str(out), "--folder", str(tmp_path)],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")},
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text()), done.stdout


def test_run_without_time_names_every_part_in_the_record_and_on_the_screen(tmp_path):
    """Nobody takes a table with gaps for the whole."""
    record, said = run_dry(tmp_path, "--budget-s", "1")
    left_out = record["facts"]["left_out"]
    assert {line.partition(":")[0].partition(",")[0] for line in left_out} >= {
        "layers and sampling",
        "attention of quire",
        "quire",
        "generate",
        "conformance at level 0",
    }
    assert all(line in said for line in left_out)
    assert [m["work"] for m in record["measurements"]] == ["copy", "matrix product"]


def test_machine_without_the_device_is_told_so_with_the_remedy(tmp_path):
    """In a sentence, as the engine would; nothing is written."""
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "quire.benchmarks.accelerator", "--out", str(out)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "install NVIDIA's driver" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_targets_are_held_against_our_figures_alone():
    """At least or at most, in the unit of the figure; peers have none to meet."""

    def measured(work, subject, value):
        return Measurement(work=work, subject=subject, unit="u", values=(value,))

    record = Record(
        name="x",
        settings={},
        measurements=[
            measured("decode attention, 64 of 4096", "quire", 0.85),
            measured("decode attention, 64 of 4096", "torch sdpa", 0.1),
            measured("decode step, llama-8b, 64 requests", "quire", 1.3),
            measured("decode step, llama-1b, 64 requests", "quire", 9.0),
            measured("add_rms_norm", "triton:sm_90", 0.79),
        ],
        ratios=[Ratio(work="mixed load, llama-8b", better="quire", worse="t", values=(25.0,))],
    )
    judged = {work: target.is_met(value) for work, value, target in judge(record)}
    assert judged == {
        "decode attention, 64 of 4096": True,
        "decode step, llama-8b, 64 requests": False,
        "add_rms_norm": False,
        "mixed load, llama-8b, over generate": True,
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run_measures_every_part_and_writes_a_record(tmp_path):
    """Ceilings, kernels, engine and suite: what a lent machine will run has been run before."""
    record, _ = run_dry(tmp_path)
    works = {measurement["work"].partition(",")[0] for measurement in record["measurements"]}
    assert {"copy", "matrix product", "add_rms_norm", "decode attention", "mixed load"} <= works
    assert {"rotary", "logprobs", "experts", "latent decode", "linear in fp8"} <= works
    assert {"causal_conv1d", "selective_scan", "ssd_scan", "gated_delta_rule"} <= works
    assert {"decode step", "host's part of a decode step"} <= works
    assert record["facts"]["conformance"]["passed"] > 0
    assert record["facts"]["left_out"] == record["facts"]["not_measured"] == []
    assert record["facts"]["conformance"].get("failed", 0) == 0
