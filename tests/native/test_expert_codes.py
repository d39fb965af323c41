"""Experts of codes in C++, against the reference's arithmetic and against themselves."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from dataclasses import replace  # noqa: E402

from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.backends.reference import ReferenceOps  # noqa: E402
from quire.core.interface import QuantizedExperts  # noqa: E402
from quire.core.models.weights.quantization import quantize_int4, quantize_int8  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 4e-3, torch.bfloat16: 2e-2, torch.float16: 6e-3}
"""Sums in another order may move an inner activation to the next code."""
FORMS = {
    "int8": quantize_int8,
    "int4": lambda weight: quantize_int4(weight, 16),
    "int4-g32": lambda weight: quantize_int4(weight, 32),
    "w8": lambda weight: replace(quantize_int8(weight), activations="none"),
    "w4": lambda weight: replace(quantize_int4(weight, 16), activations="none"),
}
SETTINGS = settings(
    max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRUTH = ReferenceOps()


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def ops(request):
    """The operators at each level; the best one is put back."""
    kernels.use_isa(request.param)
    yield CpuOps()
    kernels.use_isa(kernels.available_isas()[0])


def make_codes(rng, forms, count, hidden, inner, activation="silu", has_bias=False):
    """Random experts of a layer, gate and up in the first form, down in the second."""

    def draw(*shape):
        return torch.randn(*shape, generator=rng) / shape[-1] ** 0.5

    return QuantizedExperts(
        gate_up=[FORMS[forms[0]](draw(2 * inner, hidden)) for _ in range(count)],
        down=[FORMS[forms[1]](draw(hidden, inner)) for _ in range(count)],
        gate_up_bias=draw(count, 2 * inner) if has_bias else None,
        down_bias=draw(count, hidden) if has_bias else None,
        activation=activation,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "forms",
    [("int8", "int8"), ("int4", "int4-g32"), ("int4", "int8"), ("int8", "int4"), ("w8", "w8"),
     ("w4", "w4"), ("w4", "w8")],
)  # fmt: skip
@given(
    tokens=st.integers(0, 40),
    count=st.integers(1, 7),
    hidden=st.integers(1, 4),
    inner=st.integers(1, 4),
    activation=st.sampled_from(["silu", "gelu_tanh", "gelu", "clamped_swiglu"]),
    has_bias=st.booleans(),
    weighs_input=st.booleans(),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_codes_of_experts_equal_the_reference(
    ops, forms, dtype, tokens, count, hidden, inner, activation, has_bias, weighs_input, seed
):
    """Inputs are rounded as the weights say, of both products, whatever the forms of the two."""
    rng = torch.Generator().manual_seed(seed)
    odd = all(form in ("int8", "w8") for form in forms)
    hidden, inner = (32 * size - 5 * odd for size in (hidden, inner))
    weights = make_codes(rng, forms, count, hidden, inner, activation, has_bias)
    x = torch.randn(tokens, hidden, generator=rng).to(dtype)
    chosen = torch.rand(tokens, count, generator=rng).argsort(-1)[:, : min(3, count)]
    shares = torch.rand(chosen.shape, generator=rng)
    name = str(dtype).removeprefix("torch.")
    packed = ops.pack_quantized_experts(weights, name)
    assert packed.format.startswith("native-int")
    got = ops.experts(x, packed, shares, chosen, weighs_input=weighs_input)
    plain = TRUTH.pack_quantized_experts(weights, name)
    wanted = TRUTH.experts(x, plain, shares, chosen, weighs_input=weighs_input)
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(
        got.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
    )


@pytest.mark.parametrize("forms", [("int8", "int8"), ("int4", "int4-g32"), ("w4", "w4")])
def test_codes_of_experts_alone_equal_the_same_in_a_batch_of_many_waves(ops, forms, torch_rng):
    """A token has the same bits alone and among more pairs than are taken at a time."""
    packed = ops.pack_quantized_experts(make_codes(torch_rng, forms, 5, 64, 32), "bfloat16")
    x = torch.randn(900, 64, generator=torch_rng).bfloat16()
    chosen = torch.rand(900, 5, generator=torch_rng).argsort(-1)[:, :3]
    shares = torch.rand(900, 3, generator=torch_rng)
    together = ops.experts(x, packed, shares, chosen)
    for t in (0, 1, 450, 899):
        alone = ops.experts(x[t : t + 1], packed, shares[t : t + 1], chosen[t : t + 1])
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize(
    ("forms", "others"), [(("int8", "w8"), None), (("int8", "int8"), ("int4", "int4"))]
)
def test_experts_that_do_not_fit_each_other_are_refused(forms, others, torch_rng):
    """One would be read as the other."""
    weights = make_codes(torch_rng, forms, 2, 32, 32)
    if others:
        strange = make_codes(torch_rng, others, 1, 32, 32)
        weights = replace(weights, gate_up=[weights.gate_up[0], strange.gate_up[0]])
    with pytest.raises(ValueError, match=r"one form|do not fit"):
        CpuOps().pack_quantized_experts(weights, "float32")
