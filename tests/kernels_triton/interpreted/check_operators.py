"""Operators against the reference's, on the shapes that kernels get wrong."""

from __future__ import annotations

import pytest
import torch

from quire.backends.reference import ReferenceOps
from quire.backends.torch_accelerator.ops import TritonOps
from quire.core.interface import SamplingTensors

REFERENCE = ReferenceOps()


@pytest.fixture
def ops(launcher):
    torch.manual_seed(0)
    return TritonOps(launcher)


def near(a, b, *, atol=1e-5):
    assert a.dtype == b.dtype
    assert torch.allclose(a.double(), b.double(), atol=atol, rtol=1e-5), (a - b).abs().max()


@pytest.mark.parametrize("width", [1, 64, 100])
def test_norms_of_any_width_equal_reference(ops, width):
    """Widths that are no power of two, strided heads, and the residual's rounding."""
    wide = torch.randn(5, 3, 2 * width)
    weight = torch.randn(width)
    heads = wide[..., :width]
    near(ops.rms_norm(heads, weight, 1e-6), REFERENCE.rms_norm(heads, weight, 1e-6))
    x, residual = torch.randn(2, 7, width).bfloat16()
    other = residual.clone()
    near(
        ops.add_rms_norm(x, residual, weight.bfloat16(), 1e-6),
        REFERENCE.add_rms_norm(x, other, weight.bfloat16(), 1e-6),
        atol=4e-2,
    )
    assert torch.equal(residual, other)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_activations_equal_reference(ops, kind):
    """Also far from zero, where exponentials overflow."""
    x = torch.randn(4, 150) * torch.tensor([0.01, 1.0, 10.0, 90.0]).unsqueeze(-1)
    near(ops.gated_activation(x, kind), REFERENCE.gated_activation(x, kind), atol=1e-4)


@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotary_of_strided_heads_equals_reference(ops, is_interleaved):
    """q and k are views of one projection, and part of the features stays."""
    qkv = torch.randn(6, (4 + 2 + 2) * 20)
    other = qkv.clone()
    angle = torch.rand(6, 6) * 6
    for tensor, which in ((qkv, ops), (other, REFERENCE)):
        q, k = (part.view(6, -1, 20) for part in tensor.split([80, 40, 40], dim=-1)[:2])
        which.rotary(q, k, angle.cos(), angle.sin(), is_interleaved=is_interleaved)
    near(qkv, other)


def test_soft_cap_equals_reference_from_tiny_to_huge(ops):
    """The hyperbolic tangent keeps its digits near zero."""
    x = torch.tensor([1e-30, -1e-6, 1e-3, 0.3, 0.7, -5.0, 1e4, -1e30]) * 30
    y = x.clone()
    ops.soft_cap(x, 30.0)
    REFERENCE.soft_cap(y, 30.0)
    assert torch.allclose(x, y, rtol=4e-7, atol=0)


def settings(rows, vocab, **given):
    columns = {
        "temperature": torch.ones(rows),
        "top_k": torch.full((rows,), vocab),
        "top_p": torch.ones(rows),
        "min_p": torch.zeros(rows),
        "uniform": torch.rand(rows),
    } | given
    return SamplingTensors(**columns, is_all_greedy=False, needs_filter=True)


@pytest.mark.parametrize("vocab", [1, 50, 511, 1300])
def test_sampled_tokens_equal_reference(ops, vocab):
    """Every kind of filter, alone and together, across the edges of tiles."""
    rows = 12
    logits = torch.randn(rows, vocab) * 3
    kind = torch.arange(rows) % 6
    given = settings(
        rows,
        vocab,
        temperature=torch.where(kind == 0, 0.0, 0.5 + torch.rand(rows)),
        top_k=torch.where((kind == 1) | (kind == 5), torch.full((rows,), 7), vocab),
        top_p=torch.where((kind == 2) | (kind == 5), 0.7, 1.0),
        min_p=torch.where((kind == 3) | (kind == 5), 0.1, 0.0),
    )
    got = ops.sample(logits.clone(), given)
    assert torch.equal(got, REFERENCE.sample(logits.clone(), given))


def test_ties_at_the_nucleus_go_to_the_lowest_ids(ops):
    """Of eight equal tokens top_p 0.5 keeps the first four, whatever tile they lie in."""
    logits = torch.full((16, 1200), -50.0)
    ids = torch.tensor([3, 100, 511, 512, 700, 1023, 1024, 1199])
    logits[:, ids] = 1.0
    uniform = (torch.arange(16) + 0.5) / 16
    got = ops.sample(logits, settings(16, 1200, top_p=torch.full((16,), 0.5), uniform=uniform))
    assert got.tolist() == [int(ids[i // 4]) for i in range(16)]


def test_forbidden_tokens_are_never_chosen(ops):
    """-inf has no weight, at the smallest and the largest random number."""
    logits = torch.randn(2, 600)
    logits[:, :5] = logits[:, -5:] = float("-inf")
    uniform = torch.tensor([0.0, 1 - 2.0**-24])
    got = ops.sample(logits.clone(), settings(2, 600, uniform=uniform))
    assert got.tolist() == [5, 594]


def test_logits_are_changed_as_the_reference_does(ops):
    """Penalties, biases, lists of allowed tokens and bit masks; other rows stay."""
    logits = torch.randn(4, 70)
    other = logits.clone()
    rows, tokens = torch.tensor([0, 0, 2]), torch.tensor([5, 69, 5])
    mask = torch.randint(-(2**31), 2**31 - 1, (2, 3), dtype=torch.int32)
    table = torch.tensor([[1.3, 0.2, 0.4]] * 4)
    for which, x in ((ops, logits), (REFERENCE, other)):
        which.apply_penalties(x, rows, tokens, torch.tensor([0.0, 2.0, 1.0]), table)
        which.add_bias(x, rows, tokens, torch.tensor([1.0, float("-inf"), -2.0]))
        which.keep_only(x, torch.tensor([2]), torch.tensor([2, 2]), torch.tensor([0, 5]))
        which.apply_token_mask(x, torch.tensor([1, 3]), mask)
    assert torch.allclose(logits, other, atol=1e-6)
    assert logits[2].isfinite().sum() == 2


def test_logprobs_equal_reference(ops):
    """Ranks of ties, the best tokens and the chosen one's logarithm."""
    logits = torch.randn(3, 1100)
    logits[1, 7] = logits[1, 9] = 5.0
    chosen = torch.tensor([0, 9, 1099])
    got, want = (which.logprobs(logits, chosen, 4) for which in (ops, REFERENCE))
    near(got.selected, want.selected)
    near(got.top_logprobs, want.top_logprobs)
    assert torch.equal(got.ranks, want.ranks)
    assert torch.equal(got.top_ids, want.top_ids)
