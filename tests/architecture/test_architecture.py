"""The architecture holds, and every rule that says so is able to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import architecture
import pytest

ROOT = Path(__file__).resolve().parents[2]

PLANTED = [
    ("import-direction", "core/scheduler/a.py", "from quire.core.engine import llm\n"),
    ("import-direction", "core/engine/a.py", "def f():\n    import quire.backends.cpu\n"),
    ("import-direction", "core/worker/a.py", "from quire.core import engine\n"),
    ("import-direction", "core/serving/a.py", "import quire.kernels_cpu\n"),
    ("import-direction", "core/kv_cache/a.py", "from quire.core import scheduler\n"),
    ("import-direction", "core/interface/a.py", "from quire.core.worker import worker\n"),
    ("import-direction", "backends/cpu/a.py", "from quire.core.engine import engine\n"),
    ("import-direction", "backends/cpu/a.py", "from quire.backends.cuda import device\n"),
    ("import-direction", "backends/sim.py", "from quire.backends import null\n"),
    ("import-direction", "kernels_cpu/a.py", "from quire.core.interface import ops\n"),
    ("import-direction", "kernels_triton/a.py", "import quire.kernels_cuda\n"),
    ("import-direction", "conformance/a.py", "import quire.backends.cpu\n"),
    ("import-direction", "core/engine/a.py", "from core.scheduler import policy\n"),
    ("import-relative", "core/engine/a.py", "from . import b\n"),
    ("torch-free", "core/scheduler/a.py", "def f():\n    import torch\n"),
    ("torch-free", "core/interface/worker.py", "from torch import Tensor\n"),
    ("torch-free", "core/engine/a.py", "import torch.nn as nn\n"),
    ("device-word", "core/worker/a.py", "import torch\ntorch.cuda.synchronize()\n"),
    ("device-word", "core/worker/a.py", "x = tensor.is_cuda\n"),
    ("device-word", "core/worker/a.py", "class CudaGraphRunner: ...\n"),
    ("device-word", "core/worker/a.py", "# faster on NVIDIA\n"),
    ("device-branch", "core/worker/a.py", "if device.type == 'cpu':\n    pass\n"),
    ("device-branch", "core/worker/a.py", "if device in ('cpu', 'x'):\n    pass\n"),
    ("device-branch", "core/worker/a.py", "match d:\n    case 'cpu':\n        pass\n"),
    ("device-branch", "core/worker/a.py", "if name.startswith('cpu'):\n    pass\n"),
    ("device-branch", "core/worker/a.py", "if tensor.is_cpu:\n    pass\n"),
    ("global-state", "backends/cpu/a.py", "def f():\n    global x\n    x = 1\n"),
    ("environment", "core/engine/a.py", "import os\nos.environ['A'] = 'b'\n"),
    ("environment", "backends/a.py", "from os import getenv\n"),
    ("function-length", "core/engine/a.py", "def f():\n" + "    x = 1\n" * 60),
    ("file-length", "core/engine/a.py", "x = 1\n" * 501),
    ("vague-name", "core/engine/utils.py", "x = 1\n"),
    ("vague-name", "core/common/a.py", "x = 1\n"),
]

ALLOWED = [
    ("core/engine/a.py", "from quire.core.scheduler import policy\nimport quire.core.engine.b\n"),
    ("core/env.py", "import os\nx = os.environ.get('QUIRE_A')\n"),
    ("core/worker/a.py", "import torch\nfrom quire.core.models import layers\n"),
    ("core/worker/a.py", "host = torch.empty(4, device='cpu')  # relationship, membership\n"),
    ("backends/cpu/a.py", "from quire.backends.reference import Ops\nimport quire.kernels_cpu\n"),
    ("backends/cpu/a.py", "from quire.backends.cpu import ops\nimport quire.core.interface\n"),
    ("kernels_rocm/a.py", "import quire.kernels_triton.attention\n"),
    ("core/engine/a.py", "def f():\n" + "    x = 1\n" * 59),
]


def plant(root: Path, path: str, text: str) -> list[architecture.Violation]:
    """What the rules say about a tree with one file."""
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    return architecture.violations(root)


def test_architecture_of_this_tree_holds():
    """No rule is broken, save for what the ledger explains."""
    found = architecture.violations(ROOT)
    assert not found, "\n" + "\n".join(str(one) for one in found)


@pytest.mark.parametrize(("rule", "path", "text"), PLANTED)
def test_rule_planted_violation_is_found(tmp_path, rule, path, text):
    """Each rule is able to fail, and alone speaks up."""
    assert {one.rule for one in plant(tmp_path, path, text)} == {rule}


@pytest.mark.parametrize(("path", "text"), ALLOWED)
def test_rule_allowed_source_is_silent(tmp_path, path, text):
    """The rules forbid nothing that the design allows."""
    assert plant(tmp_path, path, text) == []


def test_every_rule_has_a_planted_violation():
    """A rule that is added without proof that it can fail is noticed."""
    planted = {rule for rule, _, _ in PLANTED}
    source = Path(architecture.__file__).read_text(encoding="utf-8")
    named = {
        line.split('Violation("')[1].split('"')[0]
        for line in source.splitlines()
        if 'Violation("' in line
    }
    assert named - {"stale-ledger", "unexplained"} == planted


def test_ledger_entry_excuses_its_violation_and_goes_stale(tmp_path):
    """An exception needs a reason and disappears with what it excused."""
    ledger = tmp_path / "tests" / "architecture" / "ledger.toml"
    ledger.parent.mkdir(parents=True)
    entry = '[[exception]]\nrule = "vague-name"\nwhere = "core/utils.py"\nwhy = "{}"\n'
    ledger.write_text(entry.format("an old name that plug-ins import"), encoding="utf-8")
    assert plant(tmp_path, "core/utils.py", "x = 1\n") == []
    ledger.write_text(entry.format(""), encoding="utf-8")
    assert [one.rule for one in architecture.violations(tmp_path)] == ["unexplained"]
    ledger.write_text(entry.format("why"), encoding="utf-8")
    (tmp_path / "core" / "utils.py").unlink()
    assert [one.rule for one in architecture.violations(tmp_path)] == ["stale-ledger"]


def modules_without_torch() -> list[str]:
    """The import names of the modules that must never load torch."""
    sources = architecture.read_sources(ROOT)
    names = [source.module for source in sources]
    parts = (*architecture.WITHOUT_TORCH, "core.discovery", "core.interface")
    return [
        f"quire.{name}"
        for name in names
        if any(architecture.is_below(name, part) for part in parts)
    ]


def test_host_side_modules_import_without_torch():
    """Not even through others do the engine, the scheduler or the listing of backends load torch."""
    blocked = ", ".join(
        repr(name) for name in sorted(architecture.TORCH_FAMILY | architecture.SLOW_TO_IMPORT)
    )
    lines = [
        "import sys",
        f"sys.modules.update(dict.fromkeys([{blocked}]))",  # None makes an import fail
        "from importlib import import_module",
        f"for name in {modules_without_torch()!r}: import_module(name)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
