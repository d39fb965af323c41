"""Whole models in one native call against the same models, operator by operator."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
kernels = pytest.importorskip("quire.kernels_cpu")

from paged_runs import PagedRun, RunningRequest, make_worker_config  # noqa: E402
from tiny_architectures import make_tiny_architecture  # noqa: E402
from tiny_models import make_tiny_model  # noqa: E402

from quire.backends.cpu.backend import CpuBackend  # noqa: E402
from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.core.models.registry import load_language_model  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
SAME_BITS = [
    "llama", "gemma2", "gpt-oss", "olmoe", "glm4-moe", "deepseek-v2", "deepseek-v2-lite",
    "deepseek-v3", "deepseek-v3-half", "deepseek-v3-yarn", "bamba", "jamba", "jamba-dense",
    "falcon_h1", "falcon_h1-norm", "mamba", "mamba2", "mamba2-narrow",
]  # fmt: skip
"""Every operator is the same kernel in both."""
GATED = [
    "qwen2-moe",
    "llama4",
    "llama4-interleaved",
    "qwen3_next",
    "qwen3_next-dense",
    "qwen3_5_text",
]
"""Sigmoids are torch's in the one and the kernels' in the other."""
HYBRIDS = {
    "bamba": ("bamba", {}),
    "jamba": ("jamba", {}),
    "jamba-dense": ("jamba", {"num_experts": 1}),
    "falcon_h1": ("falcon_h1", {"projectors_bias": True, "mlp_bias": True}),
    "falcon_h1-norm": ("falcon_h1", {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {}),
    "mamba2-narrow": ("mamba2", {"residual_in_fp32": False}),
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_next-dense": ("qwen3_next", {"num_experts": 0, "attention_bias": True}),
    "qwen3_5_text": ("qwen3_5_text", {}),
}  # fmt: skip


def save(name, path):
    """A tiny checkpoint."""
    if name not in HYBRIDS:
        return make_tiny_model(name, path, with_tokenizer=False)
    model_type, changes = HYBRIDS[name]
    directory = path / name
    make_tiny_architecture(model_type, **changes).save_pretrained(directory)
    return directory


def logits_of(model):
    """Of steps that mix prompts, chunks and single tokens; the last ones only decode."""
    run = PagedRun(model)
    texts = [np.random.default_rng(seed).integers(4, 500, size=70).tolist() for seed in range(3)]
    first, second, third = (RunningRequest(list(text)) for text in texts)
    steps = [
        [(first, 13)],
        [(first, 1), (second, 37)],
        [(first, 9), (second, 2), (third, 5)],
        [(first, 1), (second, 1), (third, 1)],
        [(third, 1)],
        [(second, 1), (third, 1)],
    ]
    with torch.inference_mode():
        return [run.step(step) for step in steps]


def both(directory, monkeypatch, **changes):
    """The model in one call, and operator by operator; mixers stay calls of their own."""
    dtype = changes.setdefault("dtype", "bfloat16")
    config = make_worker_config(directory, **{"cache_dtype": dtype, **changes})
    fused = load_language_model(config, CpuBackend().open(0))
    assert fused._chain is not None
    with monkeypatch.context() as patch:
        patch.setattr(CpuOps, "fuse_layer", lambda *_: None)
        plain = load_language_model(config, CpuBackend().open(0))
    assert plain._chain is None
    return logits_of(fused), logits_of(plain)


@pytest.mark.parametrize("name", SAME_BITS)
def test_model_in_one_call_has_the_bits_of_its_operators(name, tmp_path, monkeypatch):
    """Attention of every kind, mixers, both side by side, MLPs and experts."""
    ours, theirs = both(save(name, tmp_path), monkeypatch)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", GATED)
def test_model_with_gates_in_one_call_is_that_of_its_operators(name, tmp_path, monkeypatch):
    """A sigmoid may fall on the other side of a rounding, and its layer follows it."""
    ours, theirs = both(save(name, tmp_path), monkeypatch)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"cache_dtype": "float8_e4m3fn"}) for name in ("deepseek-v3", "falcon_h1")),
        *((name, {"quantization": "int8"}) for name in ("deepseek-v3", "llama4", "falcon_h1")),
        *((name, {"dtype": "float16"}) for name in ("falcon_h1", "qwen3_next-dense")),
    ],
)
def test_other_numbers_in_one_call(name, changes, tmp_path, monkeypatch):
    """Narrow caches, codes and float16 are read by the same kernels."""
    ours, theirs = both(save(name, tmp_path), monkeypatch, **changes)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["deepseek-v3", "falcon_h1", "qwen3_next"])
def test_row_of_a_model_in_one_call_does_not_depend_on_its_company(name, tmp_path):
    """A token that is decoded alone has the bits that it has beside others."""
    config = make_worker_config(save(name, tmp_path), dtype="bfloat16", cache_dtype="bfloat16")
    model = load_language_model(config, CpuBackend().open(0))
    text = np.random.default_rng(3).integers(4, 500, size=20).tolist()
    rows = []
    for company in range(4):
        run = PagedRun(model)
        requests = [RunningRequest(list(text)) for _ in range(company + 1)]
        with torch.inference_mode():
            for request in requests:
                run.step([(request, 12)])
            rows.append([run.step([(request, 1) for request in requests])[0] for _ in range(4)])
    for others in rows[1:]:
        for a, b in zip(rows[0], others, strict=True):
            assert torch.equal(a, b)
