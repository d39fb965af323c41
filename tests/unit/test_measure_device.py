"""What a machine that is lent for an hour runs, from a tree that is not built: the way there and back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import measure_device
import pytest

PROGRAM = Path(measure_device.__file__)


def write(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def fill(
    out: Path,
    *,
    method: str = "measured",
    hardware: str = "real",
    benchmark: str = "accelerator_cuda",
):
    """What `run` leaves, as far as `take` reads it."""
    write(out / measure_device.RECORD, {"benchmark": benchmark, "settings": {"device": "H200"}})
    write(out / measure_device.CERTIFICATE, {"hardware": hardware})
    write(out / measure_device.TABLE, {"architecture": "sm_90", "provenance": {"method": method}})
    write(out / measure_device.TRIALS, [])


def test_what_was_measured_goes_to_its_place(tmp_path):
    """Where the pages, the suite's matrix and the backend look for it."""
    out, root = tmp_path / "out", tmp_path / "tree"
    fill(out)
    taken = measure_device.take("cuda", out, root)
    assert {str(path.relative_to(root)) for path in taken} == {
        "benchmarks/results/accelerator_cuda.json",
        "docs/reports/conformance/cuda.json",
        "kernels_cuda/tables/sm_90.json",
        "docs/reports/tuning_sm_90.json",
    }


def test_what_is_there_alone_is_taken(tmp_path):
    """Steps may be run one by one; XPU keeps no tables yet."""
    fill(tmp_path)
    (tmp_path / measure_device.CERTIFICATE).unlink()
    taken = measure_device.take("xpu", tmp_path, tmp_path / "tree")
    assert [path.name for path in taken] == ["accelerator_xpu.json"]
    assert measure_device.take("cuda", tmp_path / "nothing", tmp_path / "tree") == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"method": "dry run: the figures mean nothing"}, "dry run"),
        ({"hardware": "interpreted"}, "interpreted"),
        ({"benchmark": "accelerator_cuda_dry"}, "dry run"),
    ],
)
def test_what_no_device_has_measured_is_refused_whole(tmp_path, changes, why):
    """Figures of an interpreter never stand where a device's do."""
    fill(tmp_path / "out", **changes)
    with pytest.raises(SystemExit, match=why):
        measure_device.take("cuda", tmp_path / "out", tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_places_are_those_of_the_tree():
    """A folder that was renamed would swallow what was measured."""
    root = measure_device.ROOT
    assert all((root / folder).is_dir() for folder in measure_device.TABLES.values())
    assert (root / "benchmarks/results").is_dir()
    assert (root / "docs/reports/conformance").is_dir()


def run_dry(out: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "run", "cuda", str(out), "--dry-run", *options],
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
    return done.stdout


def test_step_that_is_asked_for_runs_from_the_unbuilt_tree(tmp_path):
    """And nothing else does; what it said is kept."""
    said = run_dry(tmp_path, "--only", "conformance")
    assert "conformance: done" in said
    assert "tune" not in said
    assert json.loads((tmp_path / measure_device.CERTIFICATE).read_text())["backend"] == "cuda"
    assert (tmp_path / "conformance.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_step_runs_from_the_unbuilt_tree(tmp_path):
    """The day a machine is there is no day to look for a wrong option."""
    said = run_dry(tmp_path)
    for name in ("doctor", "accelerator", "conformance", "tune"):
        assert f"{name}: done" in said
    for file in (measure_device.RECORD, measure_device.CERTIFICATE, measure_device.TABLE):
        assert (tmp_path / file).is_file()
    with pytest.raises(SystemExit, match="nothing was taken"):
        measure_device.take("cuda", tmp_path, tmp_path / "tree")
