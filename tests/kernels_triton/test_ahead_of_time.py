"""Kernels compiled for devices that are not here, and held to their launch tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quire import kernels_cuda, kernels_rocm

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx90a", "gfx942", "gfx1100", "gfx1201")


def path_of(target: str) -> Path:
    return (kernels_cuda if target.startswith("sm") else kernels_rocm).table_path(target)


def survey(tmp_path: Path, target: str, *more: str) -> tuple[int, list[dict]]:
    """Runs the survey in a process of its own, in which nothing is interpreted."""
    file = tmp_path / "usage.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "quire.kernels_triton", str(path_of(target))]
    done = subprocess.run(
        [*command, "--json", str(file), *more],
        env={**environment, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert file.exists(), done.stderr[-3000:]
    return done.returncode, json.loads(file.read_text())["kernels"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_attention_for_llama_shapes_uses_matrix_units_and_spills_nothing(tmp_path, target):
    """The kernels that matter most, for one architecture of each vendor."""
    status, usages = survey(tmp_path, target, "--only", "32/8 heads")
    assert not [usage for usage in usages if usage.get("findings")]
    assert status == 0
    multiplying = [u for u in usages if "decode" in u["name"] or "prefill" in u["name"]]
    assert len(multiplying) >= 2
    assert all(u["matrix_instructions"] > 0 and u["spill_bytes"] == 0 for u in multiplying)


@pytest.mark.timeout(600)
def test_switches_that_interpreted_kernels_do_not_check_compile(tmp_path):
    """A variable that changes its type in a loop runs in the interpreter and compiles nowhere."""
    status, usages = survey(tmp_path, "gfx942", "--only", "route_kernel", "--sample", "3")
    assert {usage["row"] for usage in usages} == {"route"}
    assert not [usage for usage in usages if usage.get("findings")]
    assert status == 0


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("gfx1100", ("--only", "heads of 256")),
        *((target, ("--sample", "60")) for target in ("sm_80", "sm_100", "gfx90a")),
    ],
)
def test_sample_of_other_architectures_keeps_its_promises(tmp_path, target, chosen):
    """A few kernels of each, the largest heads where registers are few; the rest is slow."""
    status, usages = survey(tmp_path, target, *chosen)
    assert len(usages) > 1
    assert not [usage for usage in usages if usage.get("findings")]
    assert status == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_of_a_table_keeps_its_promises(tmp_path, target):
    """All launches: they compile, spill what is allowed, fit into shared memory."""
    status, usages = survey(tmp_path, target, "--jobs", "2")
    findings = {u["name"]: u["findings"] for u in usages if u.get("findings")}
    assert not findings
    assert status == 0
    assert len(usages) > 60


CHECK = """
from pathlib import Path
import sys
from quire.kernels_triton.launch import LaunchEntry, read_table
from quire.kernels_triton import offline
from quire.kernels_triton.offline import Usage, broken_promises
from quire.kernels_triton.survey import jobs_of
table = read_table(Path(sys.argv[1]))
usage = Usage(name="k", target="t", registers=1, spill_bytes=8, shared_bytes=1 << 30, matrix_instructions=0)
found = broken_promises(usage, LaunchEntry(kernel="k", uses_matrix_units=True), table)
assert len(found) == 3, found
assert not broken_promises(
    Usage(name="k", target="t", registers=1, spill_bytes=8, shared_bytes=0, matrix_instructions=0),
    LaunchEntry(kernel="k", max_spill_bytes=8), table)
for path in map(Path, sys.argv[1:]):
    _, launcher = jobs_of(path)
    own = len(__import__("json").loads(path.read_text())["entries"])
    assert set(range(own)) <= launcher.used, (path, set(range(own)) - launcher.used)
words = "HMMA.16816 HGMMA.64x64 IMMA.8816 IGMMA.64 QGMMA.64 UTCHMMA UTCIMMA UTCQMMA"
assert len(offline._NVIDIA_MATRIX.findall(words)) == 8
assert not offline._NVIDIA_MATRIX.findall("FFMA HFMA2.MMA IMAD EIATTR_SPARSE_MMA_MASK")
assert len(offline._AMD_MATRIX.findall("v_mfma_f32_16x16 v_wmma_f32 v_smfmac_f32 v_swmmac_f32")) == 4
kernels = {e.kernel for e in table.entries} - {"splits"}
for path in map(Path, sys.argv[1:]):
    assert {job.entry.kernel for job in jobs_of(path)[0]} == kernels, path
print("held")
"""


def test_catalogue_takes_every_row_and_broken_promises_are_found():
    """A row that no launch takes is never compiled; each kind of promise can be broken."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(path_of(target)) for target in TARGETS]
    done = subprocess.run(
        [sys.executable, "-c", CHECK, *paths],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "held", done.stderr[-3000:]
