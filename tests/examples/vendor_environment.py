"""An environment of its own into which the tests install vendors' packages."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_OFFLINE = {
    # What a user types stays `pip install .`; these keep it to what is installed already.
    "PIP_NO_INDEX": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it so: 0 turns the isolation off
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True, slots=True)
class VendorEnvironment:
    """A virtual environment that sees Quire and torch of the running one, and adds to them."""

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def run(
        self, command: str | Sequence[str], *, cwd: Path, timeout: float = 100
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command, or the text of a shell script, with this environment activated."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_"))}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-e", "-c", command] if isinstance(command, str) else list(command),
            cwd=cwd,
            env={**kept, **_OFFLINE, "PATH": path, "VIRTUAL_ENV": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def check(self, command: str | Sequence[str], *, cwd: Path, timeout: float = 100) -> str:
        """The output of a command that must succeed."""
        done = self.run(command, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def make_environment(folder: Path) -> VendorEnvironment:
    """A new environment on top of the running one, without a download."""
    pytest.importorskip("pip")
    pytest.importorskip("scikit_build_core")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    environment = VendorEnvironment(folder)
    asked = [
        str(environment.python),
        "-c",
        "import sysconfig; print(sysconfig.get_path('purelib'))",
    ]
    site = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    # Not just a path: the running environment may have .pth files of its own, as editable ones do.
    below = sysconfig.get_path("purelib")
    (site / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    for name in ("pip", "pytest", "quire"):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{environment.python}" -m {name} "$@"\n')
        script.chmod(0o755)
    return environment
