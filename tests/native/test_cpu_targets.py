"""The floors of the CPU's table of targets: counted anew from a model's own parameters."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
targets = pytest.importorskip("quire.benchmarks.cpu_targets")

from quire.benchmarks.shapes import SHAPES  # noqa: E402


@pytest.mark.parametrize("shape", ["qwen2-0.5b", "llama-tiny"])
def test_bytes_that_a_token_reads_are_those_of_the_matrices(shape):
    """A floor that counted too little would let a slow engine pass."""
    settings = dict(SHAPES[shape])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert settings["tie_word_embeddings"]
    matrices = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2}
    layers = sum(size for name, size in matrices.items() if ".layers." in name)
    head = sum(size for name, size in matrices.items() if "embed" in name)
    read = {c: targets._read_bytes(SHAPES[shape], c) for c in ("bfloat16", "int8", "int4")}
    assert read["bfloat16"] == 2 * (layers + head)
    assert read["int8"] == layers + head
    assert read["int4"] == layers * (0.5 + 3 / 64) + head
