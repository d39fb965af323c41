"""The compiled linear layers against float64, at every ISA level that this machine has."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ROUNDOFF = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def isa(request):
    """Each level once; the best one is put back."""
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(kernels.available_isas()[0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def multiply(x, packed):
    out = torch.full((x.shape[0], packed.num_outputs), float("nan"), dtype=x.dtype)
    packed.multiply(x, out)
    return out


def assert_near(actual, expected, size):
    """Within rounding of the dtype, relative to the sum of the sizes of the terms."""
    error = (actual.double() - expected).abs()
    # Where the sum itself is kept in the dtype, its own roundings add up as well.
    share = 1.0 if actual.dtype == torch.float32 else 0.1
    # Below its normal numbers float16 rounds to multiples of 2^-24.
    least = 2.0**-25 if actual.dtype == torch.float16 else 1e-30
    bound = ROUNDOFF[actual.dtype] * (expected.abs() + share * size) + least
    assert (error <= bound).all(), ((error / bound).max(), actual.dtype)


def make_codes(shape, bits, group_size, *, seed, has_zeros, scale_dtype=torch.float32):
    """Random codes, scales and zeros of a layer [N, K]."""
    num_outputs, num_inputs = shape
    g = generator(seed)
    num_groups = num_inputs // group_size if group_size else 1
    codes = torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8)
    scales = (torch.rand((num_outputs, num_groups), generator=g) / 50 + 1e-3).to(scale_dtype)
    zeros = torch.randint(0, 2**bits, scales.shape, generator=g, dtype=torch.uint8)
    return codes, scales, zeros if has_zeros else None


def pack_pairs(codes):
    """Two codes of 4 bits a byte, the earlier one in the low half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | codes[:, 1::2] << 4


def plain_product(x, codes, scales, zeros, bits, group_size, activations):
    """The definition, group by group, in float64; also the sum of the sizes of the terms."""
    size = group_size or codes.shape[1]
    total = torch.zeros((x.shape[0], codes.shape[0]), dtype=torch.float64)
    sizes = total.clone()
    x = x.float()
    for group in range(codes.shape[1] // size):
        inputs = slice(group * size, (group + 1) * size)
        zero = zeros[:, group : group + 1].double() if zeros is not None else 2.0 ** (bits - 1)
        weight = (codes[:, inputs].double() - zero) * scales[:, group : group + 1].double()
        part = x[:, inputs]
        if activations != "none":
            ranged = x if activations == "token" else part
            scale = ranged.abs().amax(1, keepdim=True) / 127.0
            q = torch.round(part / scale.masked_fill(scale == 0, 1.0))
            part = q.double() * scale.double()
        total += part.double() @ weight.T
        sizes += part.double().abs() @ weight.abs().T
    return total, sizes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 2, 5, 7, 13])
def test_dense_product_equals_float64(isa, dtype, rows):
    """Every tile of rows, with outputs and inputs that fill no panel and no lane."""
    g = generator(rows)
    weight = torch.randn((150, 77), generator=g).to(dtype)
    bias = torch.randn(150, generator=g).to(dtype)
    x = torch.randn((rows, 77), generator=g).to(dtype)
    out = multiply(x, kernels.pack_dense(weight, bias))
    size = x.double().abs() @ weight.double().abs().T
    assert_near(out, x.double() @ weight.double().T + bias.double(), size)


@given(
    rows=st.integers(1, 20),
    num_outputs=st.integers(1, 140),
    num_inputs=st.integers(1, 90),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**20),
)
@SETTINGS
def test_dense_product_any_shape_equals_float64(
    isa, rows, num_outputs, num_inputs, dtype, weight_dtype, seed
):
    """Odd shapes and strided rows; weights may be kept in another dtype than the activations."""
    g = generator(seed)
    weight = torch.randn((num_outputs, num_inputs), generator=g).to(weight_dtype)
    x = torch.randn((rows, num_inputs + 3), generator=g).to(dtype)[:, :num_inputs]
    out = multiply(x, kernels.pack_dense(weight, None))
    size = x.double().abs() @ weight.double().abs().T
    assert_near(out, x.double() @ weight.double().T, size)


@given(
    rows=st.integers(1, 14),
    num_outputs=st.integers(1, 140),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([0, 16, 32, 64]),
    bits=st.sampled_from([4, 8]),
    has_zeros=st.booleans(),
    activations=st.sampled_from(["none", "token", "group"]),
    dtype=st.sampled_from(FLOATS),
    scale_dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**20),
)
@SETTINGS
def test_quantized_product_any_shape_equals_float64(
    isa,
    rows,
    num_outputs,
    groups,
    group_size,
    bits,
    has_zeros,
    activations,
    dtype,
    scale_dtype,
    seed,
):
    """(code - zero) * scale, with activations as they are or rounded as the contract says."""
    num_inputs = groups * group_size or 7 * groups
    shape = (num_outputs, num_inputs)
    codes, scales, zeros = make_codes(
        shape, bits, group_size, seed=seed, has_zeros=has_zeros, scale_dtype=scale_dtype
    )
    x = torch.randn((rows, num_inputs), generator=generator(seed + 1)).to(dtype)
    packed = kernels.pack_codes(
        codes if bits == 8 else pack_pairs(codes),
        scales,
        zeros,
        None,
        bits=bits,
        num_inputs=num_inputs,
        group_size=group_size,
        activations=activations,
    )
    expected, size = plain_product(x, codes, scales, zeros, bits, group_size, activations)
    assert_near(multiply(x, packed), expected, size)


@pytest.mark.parametrize("activations", ["token", "group", "none"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_row_is_the_same_alone_and_among_others(isa, bits, activations):
    """No tile of rows and no number of threads changes a bit of a row's result."""
    codes, scales, _ = make_codes((200, 256), bits, 64, seed=3, has_zeros=False)
    packed = kernels.pack_codes(
        codes if bits == 8 else pack_pairs(codes), scales, None, None,
        bits=bits, num_inputs=256, group_size=64, activations=activations,
    )  # fmt: skip
    x = torch.randn((109, 256), generator=generator(4))
    whole = multiply(x, packed)
    for row in (0, 5, 95, 96, 107, 108):
        assert torch.equal(multiply(x[row : row + 1], packed)[0], whole[row])
    assert torch.equal(multiply(x[3:8], packed), whole[3:8])


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_row_is_the_same_alone_and_among_others(isa, dtype):
    """The promise on which batch invariance rests."""
    g = generator(5)
    packed = kernels.pack_dense(torch.randn((200, 301), generator=g).to(dtype), None)
    x = torch.randn((109, 301), generator=g).to(dtype)
    whole = multiply(x, packed)
    for row in (0, 5, 95, 96, 107, 108):
        assert torch.equal(multiply(x[row : row + 1], packed)[0], whole[row])


def test_int8_product_has_the_same_bits_at_every_level():
    """Integers are summed exactly, so machines agree on a model quantized to 8 bits."""
    codes, scales, _ = make_codes((70, 333), 8, 0, seed=8, has_zeros=False)
    packed = kernels.pack_codes(
        codes, scales, None, None, bits=8, num_inputs=333, group_size=0, activations="token"
    )
    x = torch.randn((9, 333), generator=generator(9))
    results = []
    for level in kernels.available_isas():
        kernels.use_isa(level)
        results.append(multiply(x, packed))
    kernels.use_isa(kernels.available_isas()[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_rounded_activations_zeros_and_infinities_keep_their_meaning(isa):
    """A row of zeros gives the bias; no division by its scale of zero shows."""
    codes, scales, _ = make_codes((5, 48), 8, 0, seed=1, has_zeros=False)
    bias = torch.arange(5.0)
    packed = kernels.pack_codes(
        codes, scales, None, bias, bits=8, num_inputs=48, group_size=0, activations="token"
    )
    assert torch.equal(multiply(torch.zeros(2, 48), packed), bias.expand(2, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 24}, "groups of 24 for 96 inputs"),
        ({"group_size": 64}, "that divides them"),
        ({"bits": 3}, "codes of 3 bits"),
        ({"activations": "int4"}, "there are none, token, group"),
    ],
)
def test_pack_codes_bad_argument_is_refused(change, words):
    """Each says what was asked, what is so and what there is."""
    arguments = {"bits": 8, "num_inputs": 96, "group_size": 32, "activations": "token"} | change
    codes, scales, _ = make_codes((4, 96), 8, 32, seed=1, has_zeros=False)
    with pytest.raises(ValueError, match=words):
        kernels.pack_codes(codes, scales, None, None, **arguments)


def test_multiply_x_of_another_width_is_refused():
    """Nothing is read past a row."""
    packed = kernels.pack_dense(torch.zeros(4, 8), None)
    with pytest.raises(ValueError, match="x has 9 inputs for weights with 8"):
        packed.multiply(torch.zeros(1, 9), torch.zeros(1, 4))


def test_use_isa_unknown_level_says_which_there_are():
    """A forced level that the machine lacks is a clear error."""
    with pytest.raises(ValueError, match="the ISA level 'amx' was asked for; this machine"):
        kernels.use_isa("amx")


def test_read_memory_reads_every_word_once():
    """The bandwidth that shares are taken of is of all the memory, not of a part."""
    words = torch.randint(-(2**62), 2**62, (64 * 7,), generator=generator(3))
    expected = sum(words.tolist()) % 2**64
    assert kernels.read_memory(words) == expected
    with pytest.raises(ValueError, match="multiple of 64"):
        kernels.read_memory(words[:65].contiguous())
