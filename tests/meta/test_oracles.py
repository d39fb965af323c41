"""The suite's truth against other people's: torch in float64 and transformers."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

from quire.conformance.oracles import attention, layers, logits, model
from quire.core.interface import AttentionSpec


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def tensor(x):
    return torch.from_numpy(np.asarray(x))


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-12)


def test_rms_norm_equals_torch_in_float64(rng):
    """The mean is over the last dimension and eps under the root."""
    x, weight = rng.standard_normal((3, 5, 16)) * 1e-2, rng.standard_normal(16)
    assert_same(
        layers.rms_norm(x, weight, 1e-4), F.rms_norm(tensor(x), (16,), tensor(weight), 1e-4)
    )


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("silu", F.silu),
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    ],
)
def test_gated_activation_equals_torch_in_float64(kind, function, rng):
    """The first half is activated, the second multiplies."""
    x = rng.standard_normal((4, 20)) * 3
    gate, up = tensor(x).chunk(2, -1)
    assert_same(layers.gated_activation(x, kind), function(gate) * up)


@pytest.mark.parametrize("window", [None, 5])
def test_paged_equals_torch_attention_in_float64(window, rng):
    """Grouped heads, causal, with and without a window."""
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_size=8,
        v_head_size=8,
        scale=0.3,
        dtype="float32",
        cache_dtype="float32",
        block_size=16,
        kind="sliding_window" if window else "causal",
        window=window,
    )
    q, k, v = (rng.standard_normal((12, n, 8)) for n in (4, 2, 2))
    back = torch.arange(12)[:, None] - torch.arange(12)
    mask = (back >= 0) & (back < (window or 99))
    theirs = F.scaled_dot_product_attention(
        *(tensor(x).permute(1, 0, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert_same(attention.paged(spec, q, k, v), theirs.permute(1, 0, 2))
    assert_same(attention.paged(spec, q, k, v, first=9), theirs.permute(1, 0, 2)[9:])


def test_logprobs_equal_torch_in_float64(rng):
    """Best first, ties by lowest id and with the better rank."""
    x = rng.standard_normal((3, 10))
    x[0, 7] = x[0, 2] = 5.0
    selected, ranks, top_ids, top = logits.logprobs(x, np.array([7, 0, 9]), 3)
    every = tensor(x).log_softmax(-1)
    assert_same(selected, every[torch.arange(3), torch.tensor([7, 0, 9])])
    assert_same(top, every.topk(3, -1).values)
    assert list(top_ids[0, :2]) == [2, 7]
    assert ranks[0] == 1


def test_sample_frequencies_are_the_probabilities(rng):
    """Many evenly spread random numbers give each token its share, and no other a chance."""
    x = rng.standard_normal(8)
    counts = np.zeros(8)
    for uniform in (np.arange(4000) + 0.5) / 4000:
        row = logits.RowSettings(temperature=0.7, top_k=5, top_p=1.0, min_p=0.0, uniform=uniform)
        counts[logits.sample(x, row)] += 1
    order = np.argsort(-x)
    kept = np.exp(x[order[:5]] / 0.7)
    np.testing.assert_allclose(counts[order[:5]] / 4000, kept / kept.sum(), atol=1e-3)
    assert counts[order[5:]].sum() == 0


def test_kept_tokens_by_hand():
    """top-p takes the token that reaches the limit; top-k keeps ties; min-p is relative."""
    x = np.log(np.array([0.5, 0.25, 0.125, 0.125]))
    base = {"temperature": 1.0, "top_k": 4, "top_p": 1.0, "min_p": 0.0, "uniform": 0.0}

    def kept(**changes):
        return logits.kept_tokens(x, logits.RowSettings(**{**base, **changes}))

    assert kept(top_p=0.6) == {0, 1}
    assert kept(top_k=3) == {0, 1, 2, 3}
    assert kept(min_p=0.4) == {0, 1}
    assert kept(top_k=2, top_p=0.6) == {0}


def test_tiny_llama_equals_transformers_in_float64(tmp_path):
    """The model of level 2 is the Llama that everybody runs."""
    transformers = pytest.importorskip("transformers")
    tiny = model.TinyLlama()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path)).double().eval()
    tokens = [5, 9, 200, 17, 3, 44, 44, 130, 255, 0, 61]
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    wide = {name: weight.astype(np.float64) for name, weight in tiny.weights().items()}
    # transformers keeps the rotary table in float32 whatever the model's dtype.
    np.testing.assert_allclose(
        model.logits(tiny, wide, tokens), expected.numpy(), rtol=1e-5, atol=1e-5
    )
