"""Weights are quantized at load by the kernels to the very bits of the core's definition."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.core.models.weights.quantization import (  # noqa: E402
    quantize,
    quantize_int4,
    quantize_int8,
)
from quire.core.models.weights.quantization_spec import QuantizationSpec  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = ("codes", "scales", "zeros")


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def isa(request):
    """Each level once; the best one is put back."""
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(kernels.available_isas()[0])


def make_weight(shape, dtype, size, seed):
    """Rows of several sizes: nothing, minus nothing, one-sided ones, and one full of ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[0], 1, generator=generator)
    weight = torch.randn(shape, generator=generator) * rows * size
    kinds = [torch.zeros_like, lambda w: -torch.zeros_like(w), torch.abs, lambda w: -w.abs()]
    for row, make in enumerate(kinds[: shape[0]]):
        weight[row] = make(weight[row])
    weight[-1] = size
    weight[-1, ::2] = -size / 2
    return weight.to(dtype)


def assert_same_bits(ours, defined):
    for name in FIELDS:
        found, wanted = getattr(ours, name), getattr(defined, name)
        assert (found is None) == (wanted is None)
        if found is not None:
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)), name
    plain = ("bits", "group_size", "num_inputs", "activations", "scheme")
    assert [getattr(ours, n) for n in plain] == [getattr(defined, n) for n in plain]


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 6),
    group_size=st.sampled_from([16, 32, 64, 128]),
    dtype=st.sampled_from(FLOATS),
    # Among them sizes whose scales have no reciprocal.
    size=st.sampled_from([1.0, 0.02, 30.0, 1e-6, 1e-37, 1e-40]),
    seed=st.integers(0, 2**16),
)
def test_int4_has_the_bits_of_the_definition(isa, rows, groups, group_size, dtype, size, seed):
    """A product fused with a sum, or another order of the terms, would choose other codes."""
    weight = make_weight((rows, groups * group_size), dtype, size, seed)
    before = weight.clone()
    ours = CpuOps().quantize_linear(weight, 4, group_size)
    assert ours is not None, isa
    assert_same_bits(ours, quantize_int4(weight, group_size))
    assert torch.equal(weight, before)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.integers(1, 70),
    num_inputs=st.integers(1, 150),
    dtype=st.sampled_from(FLOATS),
    size=st.sampled_from([1.0, 0.02, 30.0, 1e-6, 1e-40]),
    seed=st.integers(0, 2**16),
)
def test_int8_has_the_bits_of_the_definition(isa, rows, num_inputs, dtype, size, seed):
    """Rows of every length, so that the end of each is met."""
    weight = make_weight((rows, num_inputs), dtype, size, seed)
    ours = CpuOps().quantize_linear(weight, 8, 0)
    assert ours is not None, isa
    assert_same_bits(ours, quantize_int8(weight))


def test_rows_of_a_wider_matrix_are_quantized_where_they_lie():
    """A view with a stride, and one whose rows are not dense."""
    whole = make_weight((9, 128), torch.bfloat16, 1.0, seed=3)
    for weight in (whole[:, :64], whole.T.contiguous().T[:, :64]):
        assert_same_bits(CpuOps().quantize_linear(weight, 4, 32), quantize_int4(weight, 32))


def test_what_no_kernel_takes_is_quantized_by_the_definition():
    """Groups of another size, and float64."""
    ops = CpuOps()
    assert ops.quantize_linear(torch.randn(4, 16), 4, 8) is None
    assert ops.quantize_linear(torch.randn(4, 16).double(), 8, 0) is None
    weight = torch.randn(5, 96)
    spec = QuantizationSpec(scheme="int4", group_size=8)
    assert_same_bits(quantize(weight, spec, ops=ops), quantize_int4(weight, 8))


def test_groups_that_do_not_divide_are_refused_by_the_kernel():
    """A group past the end of a row would read the next."""
    weight, codes = torch.randn(3, 80), torch.empty(3, 40, dtype=torch.uint8)
    scales, zeros = torch.empty(3, 2, dtype=torch.bfloat16), torch.empty(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="groups of 64 for 80 inputs"):
        kernels.quantize_int4(weight, 64, codes, scales, zeros)
