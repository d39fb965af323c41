"""The benchmark of an accelerator, walked from end to end on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

from quire.backends.torch_accelerator.queue import StreamEvent
from quire.benchmarks import accelerator


def test_waiting_for_a_device_is_no_work_of_the_host(monkeypatch):
    """Each wait is timed, also one that fails, and nothing stays changed behind it."""
    clock = iter([1.0, 3.5, 10.0, 10.25])
    monkeypatch.setattr(accelerator.time, "perf_counter", lambda: next(clock))
    original = StreamEvent.wait
    fine, failing = StreamEvent(Mock()), StreamEvent(Mock())
    failing._event.synchronize.side_effect = ValueError
    with accelerator._timed_waiting() as waited:
        fine.wait()
        with pytest.raises(ValueError):
            failing.wait()
    assert waited == [2.5, 0.25]
    assert StreamEvent.wait is original


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_dry_run_measures_every_part_and_writes_a_record(tmp_path):
    """Ceilings, kernels, engine and suite: what a lent machine will run has been run before."""
    out = tmp_path / "record.json"
    command = [sys.executable, "-m", "quire.benchmarks.accelerator", "--dry-run"]
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
    record = json.loads(out.read_text())
    works = {measurement["work"].partition(",")[0] for measurement in record["measurements"]}
    assert {"copy", "matrix product", "add_rms_norm", "decode attention", "mixed load"} <= works
    assert {"decode step", "host's part of a decode step"} <= works
    assert record["facts"]["conformance"]["passed"] > 0
    assert record["facts"]["left_out"] == []
    assert record["facts"]["conformance"].get("failed", 0) == 0
