"""`quire doctor` on machines whose accelerator and build of torch do not fit: the whole command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_in_machines

SUPPORT = Path(stand_in_machines.__file__).parent
CPU = "__version__ = '2.11.0+cpu'\ncuda: str | None = None\nhip: str | None = None\n"
CUDA = "__version__ = '2.11.0+cu128'\ncuda: str | None = '12.8'\nhip: str | None = None\n"
CUDA_13 = "__version__ = '2.11.0+cu130'\ncuda: str | None = '13.0'\nhip: str | None = None\n"
ROCM = "__version__ = '2.11.0+rocm6.4'\ncuda: str | None = None\nhip: str | None = '6.4.43482'\n"
XPU = "__version__ = '2.11.0+xpu'\nxpu: str | None = '20250301'\n"
FROM = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/"


def diagnose(site: Path, name: str, build: str, *, cuda: int = 12080, as_json: bool = True) -> str:
    """What the command prints on a machine with devices of `name` and such a build of torch."""
    root = site / "root"
    if name == "rocm":
        stand_in_machines.make_kfd(root)
    elif name == "xpu":
        stand_in_machines.make_drm(root, [("0x8086", "0xe20b")])
    (site / "sitecustomize.py").write_text(
        "import sys, pathlib\n"
        f"sys.path.append({str(SUPPORT)!r})\n"
        "from stand_in_machines import install\n"
        f"install({name!r}, pathlib.Path({str(root)!r}), cuda={cuda})\n"
    )
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("")
    (site / "torch" / "version.py").write_text(build)
    hidden = ("TRITON_INTERPRET", "_VISIBLE_DEVICES")
    done = subprocess.run(
        [sys.executable, "-m", "quire", "doctor", *(["--json"] if as_json else [])],
        env={
            **{k: v for k, v in os.environ.items() if not k.endswith(hidden)},
            "PYTHONPATH": str(site),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "build", "found", "remedy"),
    [
        ("cuda", CPU, "2 x H200: torch 2.11.0+cpu was built without CUDA", FROM + "cu128"),
        ("cuda", ROCM, "2 x H200: torch 2.11.0+rocm6.4 was built without CUDA", FROM + "cu128"),
        ("rocm", CUDA, "gfx942: torch 2.11.0+cu128 was built without ROCm", FROM + "rocm6.4"),
        ("rocm", CPU, "gfx942: torch 2.11.0+cpu was built without ROCm", FROM + "rocm6.4"),
        (
            "xpu",
            CPU,
            "Intel Arc B-Series (0xe20b): torch 2.11.0+cpu was built without XPU",
            FROM + "xpu",
        ),
    ],
)
def test_wrong_wheel_for_a_machine_is_a_warning_with_the_command(
    tmp_path: Path, name: str, build: str, found: str, remedy: str
) -> None:
    """A device that nobody uses is not told like one that is not there."""
    findings = json.loads(diagnose(tmp_path, name, build))["findings"]
    (told,) = [f for f in findings if f["subject"] == f"backend {name}"]
    assert told == {
        "status": "warning",
        "subject": f"backend {name}",
        "found": found,
        "remedy": remedy,
    }


@pytest.mark.parametrize(
    ("cuda", "build", "said", "has_command"),
    [
        (11040, CUDA, "11.4 and torch 2.11.0+cu128 needs 12.8", False),
        (12080, CUDA_13, "12.8 and", True),
    ],
)
def test_driver_older_than_the_wheel_is_a_warning_with_the_remedy(
    tmp_path: Path, cuda: int, build: str, said: str, has_command: bool
) -> None:
    """A wheel for the driver is offered where there is one."""
    findings = json.loads(diagnose(tmp_path, "cuda", build, cuda=cuda))["findings"]
    (told,) = [f for f in findings if f["subject"] == "backend cuda"]
    assert told["status"] == "warning"
    assert f"the driver serves CUDA {said}" in told["found"]
    assert told["remedy"].startswith("update NVIDIA's driver")
    assert (FROM in told["remedy"]) == has_command


@pytest.mark.parametrize(("name", "build"), [("cuda", CUDA), ("rocm", ROCM), ("xpu", XPU)])
def test_wheel_that_fits_the_machine_is_no_fault(tmp_path: Path, name: str, build: str) -> None:
    """The same machines, with the right build."""
    findings = json.loads(diagnose(tmp_path, name, build))["findings"]
    (told,) = [f for f in findings if f["subject"] == f"backend {name}"]
    assert told["status"] == "ok", told


def test_table_ends_with_a_word_about_its_warnings(tmp_path: Path) -> None:
    """Who reads the last line alone is sent back."""
    said = diagnose(tmp_path, "cuda", CPU, as_json=False)
    assert "built without CUDA" in said
    assert said.rstrip().endswith("Nothing is wrong; see the warnings above.")
