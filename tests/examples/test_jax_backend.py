"""The JAX package of the examples: a device that torch does not own, installed in an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

pytest.importorskip("torch")
pytest.importorskip("jax")
pytest.importorskip("jaxlib")

PACKAGE = Path(__file__).resolve().parents[2] / "examples" / "jax_backend"
PROMPTS = [[5, 9, 7, 30], [(11 * i) % 500 for i in range(50)]]
NUM_OUTPUT = 12
PATIENCE = 480
"""Seconds: XLA compiles, and the machine may be slow."""

GENERATE = """
import json, sys
sys.modules["torch"] = None  # whoever imports it fails: the device must not need it
from quire import LLM, SamplingParams

def main():
    answers = {}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[1])]
    for model in sys.argv[3:]:
        with LLM(
            model, device="jax", dtype="float32", cache_memory_bytes=1 << 22, max_model_len=128,
            max_num_seqs=4, max_num_batched_tokens=64, has_own_process=sys.argv[2] == "own",
        ) as llm:
            outputs = llm.generate(asked, params, use_tqdm=False)
            answers[model] = [list(output.outputs[0].token_ids) for output in outputs]
    print(json.dumps(answers))

if __name__ == "__main__":
    main()
"""


def expected_tokens(directory: Path) -> list[list[int]]:
    """What transformers generates greedily for the prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            min_new_tokens=NUM_OUTPUT,
            max_new_tokens=NUM_OUTPUT,
            pad_token_id=0,
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


def hold_tokens(jax_environment, folder: Path, variants: list[str], process: str) -> None:
    """The engine on the JAX device gives the tokens of transformers, and imports no torch."""
    models = [make_tiny_model(variant, folder) for variant in variants]
    script = folder / "generate.py"
    script.write_text(GENERATE, encoding="utf-8")
    command = [str(jax_environment.python), str(script), json.dumps(PROMPTS), process]
    printed = jax_environment.check([*command, *map(str, models)], cwd=folder, timeout=PATIENCE)
    got = json.loads(printed.splitlines()[-1])
    assert got == {str(model): expected_tokens(model) for model in models}


def test_jax_is_listed_with_its_distribution_and_a_device(jax_environment, tmp_path):
    """Installing the package is all that a user does."""
    listed = json.loads(jax_environment.check(["quire", "backends", "--json"], cwd=tmp_path))
    (row,) = [row for row in listed if row["name"] == "jax"]
    assert (row["distribution"], row["version"]) == ("quire-jax", "1.0.0")
    assert row["is_usable"], row


def test_jax_has_the_badge_and_imports_the_interface_alone(jax_environment, tmp_path):
    """A worker of one's own takes nothing of Quire but the contract."""
    command = ["quire", "conformance", "badge", "--backend", "jax", "--json"]
    badge = json.loads(jax_environment.check(command, cwd=tmp_path))
    assert badge["is_granted"]
    assert badge["findings"] == []
    assert badge["cost"]["files"] == len(list((PACKAGE / "quire_jax").rglob("*.py")))
    assert badge["cost"]["quire_modules"] == ["quire.core.interface"]
    assert badge["cost"]["assignments"] == []


@pytest.mark.timeout(PATIENCE + 60)
def test_jax_generates_the_tokens_of_the_reference_without_torch(jax_environment, tmp_path):
    """The engine and a device that torch does not own together say what transformers says."""
    hold_tokens(jax_environment, tmp_path, ["llama"], "here")


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
def test_jax_generates_in_a_process_of_its_own(jax_environment, tmp_path):
    """As a server has it."""
    hold_tokens(jax_environment, tmp_path, ["qwen2"], "own")


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
@pytest.mark.parametrize(
    "variants",
    [
        ["llama-bias", "llama-rope-llama3", "llama-headdim20", "mistral-swa"],
        ["qwen2-swa", "qwen3-swa", "qwen3-tied", "gemma2", "gemma3", "gemma3-rope-linear"],
    ],
    ids=["llama", "others"],
)
def test_jax_runs_every_family_that_it_names(jax_environment, tmp_path, variants):
    """Biases, scaled positions, windows, soft caps and norms are each a model's own."""
    hold_tokens(jax_environment, tmp_path, variants, "here")


@pytest.mark.slow
@pytest.mark.timeout(2 * PATIENCE + 60)
def test_jax_serves_the_demo_model_as_the_cpu_does(jax_environment, tmp_path):
    """The model that ships with Quire, on both devices, in float32."""
    ask = 'quire generate demo "def main(" --max-tokens 12 --temperature 0 --dtype float32'
    ask += " --max-num-seqs 8 --max-num-batched-tokens 64"  # two shapes to compile, not five
    jax, cpu = (
        jax_environment.check(f"{ask} --device {device}", cwd=tmp_path, timeout=PATIENCE)
        for device in ("jax", "cpu")
    )
    assert jax.splitlines()[-1] == cpu.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE + 60)
def test_jax_passes_its_own_tests(jax_environment, tmp_path):
    """Blocks, failures, constraints and sampling: what the package tests of itself."""
    command = ["pytest", str(PACKAGE / "tests"), "-c", str(PACKAGE / "pyproject.toml"), "-q"]
    command += ["-p", "no:cacheprovider", "-o", f"pythonpath={PACKAGE / 'tests'}"]
    assert " passed" in jax_environment.check(command, cwd=tmp_path, timeout=PATIENCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jax_is_granted_level_three_without_an_exception(jax_environment, tmp_path):
    """The way that every vendor goes, with the official command."""
    command = "quire conformance run --backend jax --level 3 --report out"
    said = jax_environment.check(command, cwd=tmp_path, timeout=840)
    assert "jax: level 3 (" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["counts"]) <= {"passed", "unsupported"}
    assert report["expectations"] == []
    assert report["cost"]["assignments"] == []
    jax_environment.check("quire conformance verify out/report.json", cwd=tmp_path)
