"""The vendor's package of the examples: installed for real, in an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

pytest.importorskip("torch")

PACKAGE = Path(__file__).resolve().parents[2] / "examples" / "vendor_backend"
MAX_LINES = 150
OWN = {"rms_norm", "add_rms_norm", "gated_activation"}

GENERATE = """
import json, sys
from quire import LLM, SamplingParams
llm = LLM(sys.argv[1], device=sys.argv[2], dtype="float32", cache_memory_bytes=1 << 22)
asked = [{"prompt_token_ids": [5, 9, 7, 30]}, {"prompt_token_ids": [11] * 20}]
params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
print(json.dumps([list(o.outputs[0].token_ids) for o in llm.generate(asked, params)]))
"""


def reference_tokens(directory: Path) -> list[list[int]]:
    """What transformers generates greedily for the same two prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in ([5, 9, 7, 30], [11] * 20):
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=12,
            max_new_tokens=12,
            pad_token_id=0,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def test_example_is_listed_with_its_distribution_and_version(acme_environment, tmp_path):
    """Installing the package is all that a user does."""
    listed = json.loads(acme_environment.check(["quire", "backends", "--json"], cwd=tmp_path))
    (acme,) = [row for row in listed if row["name"] == "acme"]
    assert (acme["distribution"], acme["version"]) == ("quire-acme", "1.0.0")
    assert acme["is_usable"], acme
    assert acme["devices"][0]["name"] == "Acme One"


def test_example_plan_names_its_own_kernels(acme_environment, tmp_path):
    """A user sees which operators are the vendor's, and which are not yet."""
    model = make_tiny_model("llama", tmp_path)
    command = ["quire", "plan", str(model), "--device", "acme", "--json"]
    kernels = json.loads(acme_environment.check(command, cwd=tmp_path))["kernels"]
    assert {op for op, provider in kernels.items() if provider == "acme"} == OWN
    assert kernels["linear"] == "reference"


def test_example_generates_the_tokens_of_the_reference(acme_environment, tmp_path):
    """The engine and the vendor's operators together say what transformers says."""
    model = make_tiny_model("llama", tmp_path)
    printed = acme_environment.check(
        [str(acme_environment.python), "-c", GENERATE, str(model), "acme"], cwd=tmp_path
    )
    assert json.loads(printed) == reference_tokens(model)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_example_is_granted_level_three_without_an_exception(acme_environment, tmp_path):
    """The way that every vendor goes, with the official command."""
    command = "quire conformance run --backend acme --level 3 -n 2 --report out"
    said = acme_environment.check(command, cwd=tmp_path, timeout=580)
    assert "acme: level 3 (" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["counts"]) <= {"passed", "unsupported"}
    assert report["expectations"] == []
    acme_environment.check("quire conformance verify out/report.json", cwd=tmp_path)


def test_example_is_short():
    """The promise of the documentation: an afternoon, not a project."""
    lines = sum(len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py"))
    assert 0 < lines <= MAX_LINES


def test_example_has_the_badge_and_imports_the_interface_alone(acme_environment, tmp_path):
    """The numbers of the report: modules of Quire imported, assignments onto its objects."""
    command = ["quire", "conformance", "badge", "--backend", "acme", "--json"]
    badge = json.loads(acme_environment.check(command, cwd=tmp_path))
    assert badge["is_granted"]
    assert badge["findings"] == []
    assert badge["cost"]["files"] == len(list(PACKAGE.rglob("*.py")))
    assert badge["cost"]["quire_modules"] == ["quire.backends.reference", "quire.core.interface"]
    assert badge["cost"]["assignments"] == []
