"""The linear layers of an ARM, compiled here and run by an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
LEVELS = {
    "generic": [],
    "dotprod": ["-march=armv8.2-a+dotprod+fp16"],
    "i8mm": ["-march=armv8.2-a+dotprod+fp16+i8mm"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # a whole compiler run, on a machine that may be busy
    pytest.mark.skipif(
        not (COMPILER and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user"
    ),
]


@pytest.mark.parametrize("level", LEVELS)
def test_linear_layers_of_aarch64_equal_double(level, tmp_path):
    """NEON has no machine of its own in the tests, so that its paths would rot unseen."""
    program = tmp_path / "levels"
    sources = ["kernels_cpu/csrc/linear.cpp", "tests/native/linear_levels.cpp"]
    flags = ["-O1", "-std=gnu++17", "-static", "-fno-math-errno", "-Wno-psabi", *LEVELS[level]]
    subprocess.run(
        [COMPILER, *flags, f"-DQUIRE_ISA={level}", *sources, "-o", program], cwd=ROOT, check=True
    )
    command = [EMULATOR, "-cpu", "max", program]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
