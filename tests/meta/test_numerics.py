"""The numeric rule itself: what it lets through and what not."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from quire.conformance.numerics import TOLERANCES, compare
from quire.conformance.oracles import attention
from quire.core.interface import AttentionSpec


def half(x):
    return np.asarray(x).astype(np.float16).astype(np.float64)


def long_decode(length, seed=0):
    """One decoded token on float16 inputs: (spec, q, k, v) with float64 arrays."""
    rng = np.random.default_rng(seed)
    spec = AttentionSpec(
        num_heads=2,
        num_kv_heads=1,
        head_size=64,
        v_head_size=64,
        scale=0.125,
        dtype="float16",
        cache_dtype="float16",
        block_size=16,
    )
    return spec, *(half(rng.standard_normal((length, n, 64))) for n in (2, 1, 1))


@pytest.mark.parametrize("length", [256, 2048, 4096])
def test_compare_kernel_that_drops_the_last_token_never_passes(length):
    """Where 1e-2 would let it through from 1024 tokens on."""
    spec, q, k, v = long_decode(length)
    ref = attention.paged(spec, q, k, v, first=length - 1)
    base = half(attention.paged(spec, *(x.astype(np.float32) for x in (q, k, v)), first=length - 1))
    moved = np.concatenate((q[:-2], q[-1:]))
    wrong = attention.paged(spec, moved, k[:-1], v[:-1], first=length - 2)
    honest = compare(half(ref), ref, base, dtype="float16", tolerance="attention")
    caught = compare(half(wrong), ref, base, dtype="float16", tolerance="attention")
    assert honest.is_within
    assert caught.headroom > 2, caught


def test_compare_half_accumulation_is_out_of_bounds():
    """Sums in half precision are not what an operator with float32 sums gives."""
    rng = np.random.default_rng(1)
    x, w = half(rng.standard_normal((4, 2048))), half(rng.standard_normal((2048, 64)) / 45)
    total = np.zeros((4, 64), dtype=np.float16)
    for k in range(0, 2048, 16):
        total += (x[:, k : k + 16] @ w[k : k + 16]).astype(np.float16)
    ref, base = x @ w, half(x.astype(np.float32) @ w.astype(np.float32))
    measured = compare(total.astype(np.float64), ref, base, dtype="float16", tolerance="reduction")
    assert not measured.is_within
    assert compare(base, ref, base, dtype="float16", tolerance="reduction").is_within


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tolerance", sorted(TOLERANCES))
def test_compare_not_a_finite_number_fails(poison, tolerance):
    """NaN compares false with everything: it must not slip through."""
    ref = np.ones((3, 4))
    out = ref.copy()
    out[1, 2] = poison
    assert not compare(out, ref, ref, dtype="bfloat16", tolerance=tolerance).is_within


def test_compare_equal_infinities_and_zeros_pass():
    """-inf is a proper answer where it is the right one."""
    ref = np.array([[0.0, -np.inf, 1.0], [0.0, 0.0, 0.0]])
    assert compare(ref, ref, ref, dtype="float32", tolerance="exact").headroom == 0
    off = ref.copy()
    off[0, 1] = -1e30
    assert not compare(off, ref, ref, dtype="float32", tolerance="elementwise").is_within


def test_compare_one_bad_small_row_among_large_ones_fails():
    """The rule holds each row by its own size."""
    ref = np.array([[1000.0, 900.0], [0.01, 0.02]])
    out = ref + np.array([[0.0, 0.0], [0.01, 0.0]])
    measured = compare(out, ref, ref, dtype="float32", tolerance="attention")
    assert (measured.is_within, measured.where) == (False, "row 1")


def test_compare_another_shape_fails():
    """A result of another shape is not broadcast into passing."""
    measured = compare(
        np.ones((1, 4)), np.ones((3, 4)), np.ones((3, 4)), dtype="float32", tolerance="exact"
    )
    assert not measured.is_within
    assert "shape (1, 4) instead of (3, 4)" in measured.where


def test_compare_poor_base_does_not_open_the_gate():
    """The cap of the class holds however bad the baseline is."""
    ref = np.ones((2, 8))
    base = ref + 0.5
    out = ref + 0.4
    assert not compare(out, ref, base, dtype="float16", tolerance="reduction").is_within


@pytest.mark.parametrize("name", sorted(TOLERANCES))
def test_tolerance_has_a_reason(name):
    """No number without one."""
    assert len(TOLERANCES[name].reason) > 40
