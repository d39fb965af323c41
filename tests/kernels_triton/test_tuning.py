"""`quire tune`, walked in the interpreter: what a lent device will run has been run before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quire.kernels_triton.launch import read_table


def tune(tmp_path, backend, *more):
    file = tmp_path / "table.json"
    done = subprocess.run(
        [sys.executable, "-m", "quire", "tune", "--device", backend, "--out", str(file), *more],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return file, done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dry_run_writes_a_table_that_can_be_read_and_says_where_it_is_from(tmp_path):
    """Every row of the old table is in the new one, and every candidate ran and is written down."""
    file, done = tune(tmp_path, "rocm", "--dry-run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 could not run" in done.stdout
    table = read_table(file)
    assert "dry run" in table.provenance["method"]
    assert {"device", "triton", "torch", "date"} <= set(table.provenance)
    assert table.find("latent_decode", {"head_size": 512, "item_size": 2}).constants["BLOCK_N"]
    trials = json.loads(file.with_suffix(".trials.json").read_text())
    assert {trial["kernel"] for trial in trials} == {
        *("decode", "prefill", "splits", "latent_decode", "latent_prefill"),
        *("experts_up", "experts_down"),
        "rms_norm",
        "gated_activation",
        "quantized_linear",
        "float8_linear",
    }
    assert all(trial["seconds"] > 0 for trial in trials)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("backend", "said"), [("cuda", "interpreted kernels have no speed"), ("cpu", "nothing to tune")]
)
def test_tuning_what_has_no_speed_or_no_table_is_refused(tmp_path, backend, said):
    """Figures of the interpreter never become a table."""
    file, done = tune(tmp_path, backend)
    assert done.returncode != 0
    assert said in " ".join((done.stdout + done.stderr).split())
    assert not file.exists()
