"""Compilers and emulators of the levels that have no machine of their own in the tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = "kernels_cpu/csrc"
_FLAGS = ("-std=gnu++17", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One level of one architecture, and who compiles and runs it."""

    level: str
    compilers: tuple[str, ...]
    """The first that is installed is taken."""
    flags: tuple[str, ...]
    emulator: tuple[str, ...]
    """Empty: this machine runs it."""

    def build(self, sources: Sequence[str], program: Path, extra: Sequence[str] = ()) -> list[str]:
        """Compiles; returns the command that runs the program. Skips where a tool is missing."""
        compiler = next((path for name in self.compilers if (path := shutil.which(name))), None)
        if compiler is None:
            pytest.skip(f"needs {' or '.join(self.compilers)}")
        if self.emulator and shutil.which(self.emulator[0]) is None:
            pytest.skip(f"needs {self.emulator[0]}")
        options = [*_FLAGS, *self.flags, *extra, f"-DQUIRE_ISA={self.level}"]
        subprocess.run([compiler, *options, *sources, "-o", program], cwd=ROOT, check=True)
        return [*self.emulator, str(program)]


def check(command: Sequence[str], given: str = "") -> None:
    """Runs a driver, which prints what failed and how much did."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, input=given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout


RISCV = Target(
    level="generic",
    compilers=("riscv64-linux-gnu-g++",),
    flags=("-static",),
    emulator=("qemu-riscv64",),
)
# GCC before 14 knows no vectors of RISC-V; clang lowers the vector extensions of our source to them.
RISCV_VECTORS = Target(
    level="rvv",
    compilers=("clang++-19", "clang++-18", "clang++-17", "clang++"),
    flags=("--target=riscv64-linux-gnu", "-march=rv64gcv", "-static"),
    emulator=("qemu-riscv64", "-cpu", "rv64,v=true,vlen=256,vext_spec=v1.0"),
)
