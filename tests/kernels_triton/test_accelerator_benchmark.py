"""The benchmark of an accelerator, walked from end to end on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


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
    assert record["facts"]["conformance"]["passed"] > 0
    assert record["facts"]["left_out"] == []
    assert record["facts"]["conformance"].get("failed", 0) == 0
