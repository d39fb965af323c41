"""The kernels under AddressSanitizer and UBSan, and those of an ARM under an emulator."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels_cpu" / "csrc"
DRIVER = ROOT / "tests" / "native" / "kernel_levels.cpp"
COMPILER = shutil.which("g++")
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
LEVELS = {
    "generic": ([], ""),
    "avx2": (AVX2, "avx2"),
    "avx512": (AVX512, "avx512vl"),
    "avx512_bf16": ([*AVX512, "-mavx512vnni", "-mavx512bf16"], "avx512_bf16"),
}
FLAGS = ["-std=gnu++17", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi"]

pytestmark = pytest.mark.slow


def build(compiler, flags, level, program):
    """Compiles the driver with the kernels of one level."""
    sources = [KERNELS / "kernels.cpp", KERNELS / "layers.cpp", DRIVER]
    command = [compiler, *FLAGS, *flags, f"-DQUIRE_ISA={level}", *map(str, sources), "-o", program]
    subprocess.run(command, cwd=ROOT, check=True)


def run(command):
    """Runs a program that prints what failed."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


@pytest.mark.skipif(not COMPILER or platform.machine() != "x86_64", reason="needs g++ on an x86-64")
@pytest.mark.parametrize("level", LEVELS)
def test_kernels_are_clean_under_sanitizers(level, tmp_path):
    """A read past the end of a row is silent until the row ends where a page does."""
    flags, feature = LEVELS[level]
    if feature and feature not in Path("/proc/cpuinfo").read_text(encoding="utf-8").split():
        pytest.skip(f"this machine has no {feature}")
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    build(COMPILER, [*flags, *sanitizers], level, tmp_path / "levels")
    run([tmp_path / "levels", "25"])


@pytest.mark.skipif(
    not (ARM_COMPILER and EMULATOR), reason="needs g++-aarch64-linux-gnu and qemu-user"
)
def test_kernels_of_aarch64_equal_double(tmp_path):
    """NEON has no machine of its own in the tests, so that its paths would rot unseen."""
    build(ARM_COMPILER, ["-O2", "-static"], "generic", tmp_path / "levels")
    run([EMULATOR, "-cpu", "max", tmp_path / "levels", "6"])
