"""The CPU backend is certified at every ISA level of this machine, not at its best alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from quire import kernels_cpu

LEVELS = kernels_cpu.available_isas() if kernels_cpu.HAVE_NATIVE else []
_FORCE = """\
from quire import kernels_cpu
kernels_cpu.use_isa({level!r})
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.skipif(not LEVELS, reason="the compiled kernels are missing")
@pytest.mark.parametrize("level", LEVELS)
def test_cpu_backend_is_granted_levels_1_to_3_at_each_isa(level: str, tmp_path: Path) -> None:
    """An operator that is wrong at a level below the best fails on other people's machines."""
    # Every process of the suite starts with the level forced.
    (tmp_path / "sitecustomize.py").write_text(_FORCE.format(level=level))
    report = tmp_path / "report"
    command = [sys.executable, "-m", "quire", "conformance", "run", "--backend", "cpu"]
    done = subprocess.run(
        [*command, "--level", "3", "--report", str(report)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    document = (report / "report.json").read_bytes()
    assert f"native:{level}".encode() in document
    assert msgspec.json.decode(document)
