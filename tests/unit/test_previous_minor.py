"""A package written for the minor version before, kept as a fixture, loads and serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "previous_minor"

LOAD = """
import json, sys
from quire.core.interface import version
version.INTERFACE_VERSION = sys.argv[1]
from quire.core.discovery import inspect_backends
(report,) = [r for r in inspect_backends() if r.entry.name == "previous"]
print(json.dumps([report.is_usable, report.interface_version, report.error]))
"""

SERVE = """
import json, sys
from quire import LLM, SamplingParams
params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
answers = []
for device in ("previous", "cpu"):
    llm = LLM(sys.argv[1], device=device, dtype="float32", cache_memory_bytes=1 << 22)
    (output,) = llm.generate([{"prompt_token_ids": [5, 9, 7]}], params)
    answers.append(list(output.outputs[0].token_ids))
print(json.dumps(answers))
"""


def ask(program: str, argument: str) -> list:
    """What `program` prints as JSON, with the fixture installed."""
    done = subprocess.run(
        [sys.executable, "-c", program, argument],
        env={**os.environ, "PYTHONPATH": str(FIXTURE), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ours", ["1.0", "1.1"])
def test_backend_of_the_previous_minor_loads(ours):
    """A vendor has one minor's time to follow."""
    assert ask(LOAD, ours) == [True, "1.0", ""]


@pytest.mark.parametrize("ours", ["1.2", "2.0", "2.1"])
def test_backend_older_than_the_window_is_refused_with_the_side_to_upgrade(ours):
    """Two minors or a major later it is refused before anything of it runs."""
    is_usable, _, error = ask(LOAD, ours)
    assert not is_usable
    assert "was written for interface 1.0" in error
    assert f"upgrade the backend package to one written for {ours}" in error


def test_backend_of_the_previous_minor_serves_the_reference_tokens(tmp_path):
    """Not only loads: the whole of 1.0 that it uses still means the same."""
    pytest.importorskip("torch")
    model = make_tiny_model("gemma2", tmp_path)
    previous, reference = ask(SERVE, str(model))
    assert previous == reference
