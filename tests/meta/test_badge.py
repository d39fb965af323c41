"""The zero-patch badge: granted to what keeps to the interface, refused with the line otherwise."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from quire.conformance.badge import findings_in, make_badge
from quire.conformance.patches import lines_of_patches
from quire.conformance.vendor_cost import cost_of
from quire.core.errors import ConfigError
from quire.core.serving.cli.application import application

GOOD = """
from quire.core.interface import Backend, DeviceInfo, Probe
from quire.backends.reference import ReferenceOps, TorchDevice
from quire import kernels_cpu

class AcmeOps(ReferenceOps):
    def rms_norm(self, x, weight, eps):
        return super().rms_norm(x, weight, eps)

class Board(TorchDevice):
    def __init__(self, info):
        super().__init__(info=info)
        self.counts = {}
        self.counts["opened"] = 1
        ops = AcmeOps()
        ops.cache = []
        ops.cache.append(2)

class Plugin(Backend):
    name = "acme"
    interface_version = "1.0"
"""

PATCHES = [
    "from quire.core.interface import Ops\nOps.linear = None",
    "from quire.core.interface import Ops\nOps.linear: int = 3",
    "from quire.core import interface\ninterface.NULL_BLOCK += 1",
    "import quire.core.interface\nquire.core.interface.OP_SPECS = ()",
    "import quire.core.interface as contract\ncontract.NULL_BLOCK = 2",
    "from quire.core.interface import Ops\nsetattr(Ops, 'linear', None)",
    "from quire.core.interface import Ops\ntype.__setattr__(Ops, 'linear', None)",
    "from quire.core.interface import Ops\ndel Ops.linear",
    "from quire.core.interface import Ops\nOps.__dict__['linear'] = None",
    "from quire.core.interface import Ops\nvars(Ops).update(linear=None)",
    "from quire.core.interface import Ops as Base\nTheirs = Base; Theirs.linear = None",
    "from quire.core.interface import Ops, Device\nx, Ops.linear = 1, 2",
    "import sys\nsys.modules['quire.core.scheduler'] = None",
    "from unittest import mock\nmock.patch('quire.core.engine.run').start()",
    "from unittest.mock import patch\nfrom quire.core.interface import Ops; patch.object(Ops, 'linear')",
]


@pytest.mark.parametrize("source", PATCHES)
def test_patch_of_every_kind_is_found_on_its_line(source):
    """However a vendor reaches into Quire, the line is named."""
    assert lines_of_patches(ast.parse(source)) == [2]


def test_source_of_an_honest_backend_has_no_finding(tmp_path):
    """Subclasses, own attributes and own instances are what a vendor is meant to write."""
    path = tmp_path / "acme.py"
    path.write_text(GOOD)
    assert findings_in(path) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("from quire.core.scheduler import policy", "quire.core.scheduler.policy"),
        ("import quire.core.engine", "quire.core.engine"),
        ("from quire.backends.cpu import CpuBackend", "quire.backends.cpu.CpuBackend"),
        ("import importlib; importlib.import_module('quire.core.worker')", "quire.core.worker"),
        ("from quire import LLM", "quire.LLM"),
    ],
)
def test_import_beyond_the_interface_is_a_finding(tmp_path, line, said):
    """What is not public may change in any release."""
    path = tmp_path / "acme.py"
    path.write_text(f"\n{line}\n")
    assert findings_in(path) == [f"acme.py:2: imports {said}, which is not public"]


def install(folder, name, source, neighbour=""):
    """A distribution of a backend module and a module that no entry point names."""
    (folder / f"quire_{name}.py").write_text(source)
    (folder / f"{name}_extras.py").write_text(neighbour)
    info = folder / f"quire_{name}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quire-{name}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[quire.backends]\n{name} = quire_{name}:Plugin\n")
    (info / "RECORD").write_text(f"quire_{name}.py,,\n{name}_extras.py,,\n")


def test_badge_of_a_good_package_is_granted_without_running_it(tmp_path, monkeypatch):
    """The check is safe on a package that nobody trusts yet."""
    install(tmp_path, "acme", GOOD + "\nraise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    badge = make_badge("acme")
    assert badge.is_granted, badge.findings
    assert badge.distribution == "quire-acme 1.2.3"


def test_badge_command_of_a_patching_package_names_the_line_and_fails(tmp_path, monkeypatch):
    """A patch hidden in a file beside the backend counts as well."""
    install(tmp_path, "acme", GOOD, "import quire.core.engine.llm as llm\nllm.LLM = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = CliRunner().invoke(application, ["conformance", "badge", "--backend", "acme"])
    assert done.exit_code == 1
    assert "acme_extras.py:1: imports quire.core.engine.llm" in done.stderr
    assert "acme_extras.py:2: changes an object of Quire's" in done.stderr


def test_cost_of_a_module_inside_a_package_imports_nothing(tmp_path, monkeypatch):
    """An entry point may name a module deep in a package; its parents are not run either."""
    (tmp_path / "acme_deep").mkdir()
    (tmp_path / "acme_deep" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "acme_deep" / "plugin.py").write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    cost = cost_of("acme_deep.plugin:Plugin")
    assert cost.files == 2
    assert "quire.core.interface" in cost.quire_modules


@pytest.mark.parametrize("name", ["cpu", "null", "sim"])
def test_badge_of_the_backends_of_the_house_is_granted(name):
    """In-tree backends have no privilege: they pass the vendors' check."""
    done = CliRunner().invoke(application, ["conformance", "badge", "--backend", name, "--json"])
    assert json.loads(done.stdout)["findings"] == []
    assert done.exit_code == 0


def test_badge_of_an_unknown_backend_is_an_error():
    """A typing mistake is not a badge."""
    with pytest.raises(ConfigError, match="not installed"):
        make_badge("nothing")


def test_badge_command_needs_neither_torch_nor_pytest(tmp_path):
    """It is read from the source alone, so that it can be granted on any machine."""
    for name in ("torch", "pytest", "xdist"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not needed')\n")
    done = subprocess.run(
        [sys.executable, "-m", "quire", "conformance", "badge", "--backend", "sim"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "zero-patch badge granted" in done.stdout
