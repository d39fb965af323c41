"""A decoder layer in one call against the same layer, operator by operator: bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from quire.backends.cpu.attention import CpuAttention  # noqa: E402
from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.core.interface import (  # noqa: E402
    AttentionBatch,
    AttentionSpec,
    ExpertWeights,
    MixingPlace,
    QuantizedExperts,
    QuantizedWeight,
    RoutingSpec,
)
from quire.core.models.layers import DecoderLayer, LayerWeights  # noqa: E402
from quire.core.models.mlp import DenseWeights, MixtureWeights  # noqa: E402
from quire.core.models.self_attention import HeadWeights  # noqa: E402
from quire.core.models.weights.quantization import quantize_int8  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
BLOCK_SIZE = 4
EPS = 1e-6


class OneByOne(CpuOps):
    """The same kernels; no layer is fused for a subclass, which may have operators of its own."""


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator)


def pack(ops, precision, weight, bias, dtype):
    """A layer in plain numbers, or in codes of so many bits."""
    if precision == "plain":
        return ops.pack_linear(weight.to(dtype), None if bias is None else bias.to(dtype))
    bits, group_size = precision
    num_outputs, num_inputs = weight.shape
    generator = torch.Generator().manual_seed(num_outputs)
    num_bytes = num_inputs if bits == 8 else (num_inputs + 1) // 2
    codes = torch.randint(0, 256, (num_outputs, num_bytes), generator=generator).byte()
    groups = num_inputs // group_size if group_size else 1
    quantized = QuantizedWeight(
        bits=bits,
        group_size=group_size,
        num_inputs=num_inputs,
        codes=codes,
        scales=torch.rand(num_outputs, groups, generator=generator) / 100,
        zeros=None,
        activations="group" if group_size else "token",
    )
    name = str(dtype).removeprefix("torch.")
    return ops.pack_quantized_linear(quantized, None if bias is None else bias.to(dtype), name)


def make_weights(ops, p, generator):
    """Random weights of one layer, and the norm of what follows."""
    hidden, inner = p["hidden"], p["inner"]
    size, heads, kv_heads = p["head_size"], p["heads"], p["kv_heads"]
    dtype = p["dtype"]

    def linear(num_outputs, num_inputs, has_bias=False):
        weight = draw(generator, num_outputs, num_inputs) / num_inputs**0.5
        bias = draw(generator, num_outputs) if has_bias else None
        return pack(ops, p["precision"], weight, bias, dtype)

    def norm(width):
        return (1 + draw(generator, width) / 10).to(dtype)

    joint = p["norms"] == "joint"
    has_norms, is_sandwich = p["norms"] != "none", p["is_sandwich"]
    weights = LayerWeights(
        input_norm=norm(hidden),
        attention=HeadWeights(
            qkv=linear((heads + 2 * kv_heads) * size, hidden, has_bias=True),
            q_norm=norm(size * (heads if joint else 1)) if has_norms else None,
            k_norm=norm(size * (kv_heads if joint else 1)) if has_norms else None,
            sinks=draw(generator, heads) if p["has_sinks"] else None,
        ),
        output=linear(hidden, heads * size),
        attention_output_norm=norm(hidden) if is_sandwich else None,
        mlp_norm=norm(hidden),
        mlp=make_mixture(ops, p, generator, linear)
        if p["mixture"]
        else DenseWeights(gate_up=linear(2 * inner, hidden), down=linear(hidden, inner)),
        mlp_output_norm=norm(hidden) if is_sandwich else None,
    )
    return weights, norm(hidden)


def make_mixture(ops, p, generator, linear):
    """Experts in plain numbers or in codes, with a shared MLP or without."""
    mixture, hidden, inner = p["mixture"], p["hidden"], p["inner"]
    count = mixture["num_experts"]
    gate_up = draw(generator, count, 2 * inner, hidden) / hidden**0.5
    down = draw(generator, count, hidden, inner) / inner**0.5
    if p["precision"] == "plain":
        experts = ops.pack_experts(
            ExpertWeights(
                gate_up=gate_up.to(p["dtype"]),
                down=down.to(p["dtype"]),
                gate_up_bias=draw(generator, count, 2 * inner).to(p["dtype"]),
                activation=mixture["activation"],
            )
        )
    else:
        codes = QuantizedExperts(
            gate_up=[quantize_int8(weight) for weight in gate_up],
            down=[quantize_int8(weight) for weight in down],
            activation=mixture["activation"],
        )
        experts = ops.pack_quantized_experts(codes, str(p["dtype"]).removeprefix("torch."))
    has_shared, has_bias = mixture["has_shared"], mixture["has_bias"]
    return MixtureWeights(
        router=ops.pack_router(draw(generator, count, hidden), draw(generator, count)),
        correction_bias=draw(generator, count) if has_bias else None,
        experts=experts,
        shared=DenseWeights(gate_up=linear(2 * inner, hidden), down=linear(hidden, inner))
        if has_shared
        else None,
        shared_gate=None,
    )


def make_routing(mixture):
    """How tokens choose."""
    return RoutingSpec(
        num_experts=mixture["num_experts"],
        num_chosen=mixture["num_chosen"],
        score=mixture["score"],
        is_renormalised=mixture["has_bias"],
        scale=1.5,
        num_groups=2,
        num_kept_groups=mixture["num_kept_groups"],
        group_score="top2",
    )


def make_layer(ops_class, p):
    """A layer, and its attention; the same weights for every class of operators."""
    ops, generator = ops_class(), torch.Generator().manual_seed(p["seed"])
    spec = AttentionSpec(
        num_heads=p["heads"],
        num_kv_heads=p["kv_heads"],
        head_size=p["head_size"],
        v_head_size=p["head_size"],
        scale=p["head_size"] ** -0.5,
        dtype=str(p["dtype"]).removeprefix("torch."),
        cache_dtype=p["cache_dtype"] or str(p["dtype"]).removeprefix("torch."),
        block_size=BLOCK_SIZE,
        kind=p["kind"],
        window=None if p["kind"] == "causal" else 5,
        soft_cap=p["soft_cap"],
        has_sinks=p["has_sinks"],
    )
    decoder = SimpleNamespace(
        norm_eps=EPS,
        num_heads=p["heads"],
        num_kv_heads=p["kv_heads"],
        head_size=p["head_size"],
        is_rope_interleaved=p["is_interleaved"],
        is_qk_norm_joint=p["norms"] == "joint",
        activation=p["activation"],
        ropes=(SimpleNamespace(rotary_size=2 * p["pairs"]),),
        layer_ropes=(0,),
        has_rotated_norm=False,
        has_attention_gate=False,
        position_table=lambda _layer: 0,
        mixture=None
        if p["mixture"] is None
        else SimpleNamespace(routing=make_routing(p["mixture"]), weighs_input=False),
    )
    weights, following = make_weights(ops, p, generator)
    attention = CpuAttention(spec)
    layer = DecoderLayer(
        decoder, weights, following, ops=ops, attention=attention, group=0, index=0
    )
    return layer, attention


def run_steps(layer, attention, p):
    """Every step's result and residual, and what the cache holds in the end."""

    def run(x, residual, angles, caches, plans):
        out = x.new_empty((len(x), p["heads"], p["head_size"]))
        return layer.forward(x, residual, angles[0], caches[0], plans[0], out)

    return run_layers(run, [attention], p)


def run_layers(run, attentions, p):
    """The same for layers that follow each other: run(x, residual, angles, caches, plans)."""
    lengths = [sum(step[r] for step in p["steps"]) for r in range(len(p["steps"][0]))]
    each = -(-max(*lengths, 1) // BLOCK_SIZE)
    caches = [attention.allocate(each * len(lengths) + 1) for attention in attentions]
    for cache in caches:
        for tensor in cache.tensors.values():
            tensor.view(torch.uint8).zero_()
    table = torch.arange(each * len(lengths)).flip(0).view(len(lengths), -1)
    generator = torch.Generator().manual_seed(p["seed"] + 1)
    done, results = [0] * len(lengths), []
    for new in p["steps"]:
        starts = [0, *torch.tensor(new).cumsum(0).tolist()]
        slots, positions = [], []
        for r, n in enumerate(new):
            here = torch.arange(done[r], done[r] + n)
            positions.append(here)
            slots.append(table[r][here // BLOCK_SIZE] * BLOCK_SIZE + here % BLOCK_SIZE)
            done[r] += n
        batch = AttentionBatch(
            query_start_loc=torch.tensor(starts, dtype=torch.int32),
            seq_lens=torch.tensor(done, dtype=torch.int32),
            block_table=table.int(),
            slot_mapping=torch.cat(slots),
            query_start_loc_host=starts,
            seq_lens_host=list(done),
            num_requests=len(lengths),
            num_tokens=starts[-1],
            max_query_len=max(new),
            max_seq_len=max(done),
        )
        turns = torch.cat(positions)[:, None] * (torch.arange(p["pairs"]) + 1.0)
        x = draw(generator, starts[-1], p["hidden"]).to(p["dtype"])
        residual = draw(generator, starts[-1], p["hidden"]).to(p["dtype"])
        angles = [((turns * f).cos(), (turns * f).sin()) for f in (1.0, 0.5)]
        plans = [attention.plan(batch) for attention in attentions]
        results += [run(x, residual, angles, caches, plans).clone(), residual]
    return results + [cache.tensors[name] for cache in caches for name in sorted(cache.tensors)]


def assert_same_bits(p):
    fused, attention = make_layer(CpuOps, p)
    plain, other = make_layer(OneByOne, p)
    assert fused.fused is not None
    assert plain.fused is None
    ours, theirs = run_steps(fused, attention, p), run_steps(plain, other, p)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


BASE = {
    "dtype": torch.bfloat16,
    "precision": "plain",
    "mixture": None,
    "hidden": 48,
    "inner": 40,
    "heads": 4,
    "kv_heads": 2,
    "head_size": 16,
    "pairs": 8,
    "norms": "none",
    "is_sandwich": False,
    "has_sinks": False,
    "is_interleaved": False,
    "activation": "silu",
    "kind": "causal",
    "soft_cap": None,
    "cache_dtype": None,
    "steps": [[7, 3], [1, 1], [2, 0]],
    "seed": 0,
}


@settings(deadline=None, max_examples=60)
@given(
    group=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    head_size=st.sampled_from([4, 6, 16, 20, 64]),
    hidden=st.integers(1, 9),
    inner=st.integers(1, 9),
    changes=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([torch.bfloat16, torch.float16]),
            "precision": st.sampled_from(["plain", (8, 0), (4, 0)]),
            "norms": st.sampled_from(["none", "each", "joint"]),
            "is_sandwich": st.booleans(),
            "has_sinks": st.booleans(),
            "is_interleaved": st.booleans(),
            "activation": st.sampled_from(["silu", "gelu_tanh", "gelu"]),
            "kind": st.sampled_from(["causal", "sliding_window", "chunked"]),
            "soft_cap": st.sampled_from([None, 20.0]),
            "cache_dtype": st.sampled_from([None, "int8", "float8_e4m3fn"]),
            "seed": st.integers(0, 100),
        }
    ),
    steps=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=3),
)
def test_fused_layer_odd_shapes_has_the_bits_of_its_operators(
    group, kv_heads, head_size, hidden, inner, changes, steps
):
    """Whatever the sizes, norms, precisions and caches, fusing changes no bit."""
    sizes = {
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "head_size": head_size,
        "pairs": max(head_size // 4, 1),
        "hidden": 4 * hidden,
        "inner": 4 * inner,
    }
    assert_same_bits(BASE | sizes | changes | {"steps": steps})


MIXTURE = {
    "num_experts": 6,
    "num_chosen": 2,
    "num_kept_groups": 2,
    "score": "softmax",
    "has_bias": False,
    "has_shared": False,
    "activation": "silu",
}


@settings(deadline=None, max_examples=40)
@given(
    hidden=st.integers(1, 20),
    inner=st.integers(1, 20),
    changes=st.fixed_dictionaries(
        {
            "precision": st.sampled_from(["plain", (8, 0)]),
            "norms": st.sampled_from(["none", "each"]),
            "is_sandwich": st.booleans(),
            "activation": st.sampled_from(["silu", "gelu_tanh"]),
            "seed": st.integers(0, 100),
        }
    ),
    mixture=st.fixed_dictionaries(
        {
            "num_chosen": st.integers(1, 3),
            "num_kept_groups": st.integers(1, 2),
            "score": st.sampled_from(["softmax", "sigmoid"]),
            "has_bias": st.booleans(),
            "has_shared": st.booleans(),
            "activation": st.sampled_from(["silu", "clamped_swiglu"]),
        }
    ),
    steps=st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=2), min_size=1, max_size=3),
)
def test_fused_layer_with_a_mixture_has_the_bits_of_its_operators(
    hidden, inner, changes, mixture, steps
):
    """Router, choice, experts and the shared MLP in one call, alone and by the team of threads."""
    sizes = {"hidden": 4 * hidden, "inner": 4 * inner, "mixture": MIXTURE | mixture}
    assert_same_bits(BASE | sizes | changes | {"steps": [*steps, [1, 1], [1, 0]]})


def test_fused_layer_with_a_mixture_long_prompt_has_the_same_bits():
    """Rows go through the router and the shared MLP in pieces, and experts in waves."""
    mixture = MIXTURE | {"has_shared": True, "num_chosen": 3}
    assert_same_bits(BASE | {"steps": [[520, 17]], "mixture": mixture})


def test_mixture_in_float16_is_not_fused():
    """Its router reads float32, which the chain makes of bfloat16 alone."""
    layer, _ = make_layer(CpuOps, BASE | {"mixture": MIXTURE, "dtype": torch.float16})
    assert layer.fused is None


def test_fused_layer_more_rows_than_go_through_the_mlp_at_once_has_the_same_bits():
    """A long prompt goes through the MLP in pieces, the last of them short."""
    assert_same_bits(BASE | {"steps": [[520, 17]], "norms": "each"})


def test_fused_layer_groups_of_int4_has_the_bits_of_its_operators():
    """Codes of four bits in groups, as checkpoints have them."""
    assert_same_bits(BASE | {"precision": (4, 16), "hidden": 64, "inner": 32})


def test_float32_layer_is_not_fused():
    """oneDNN multiplies float32: the layer goes operator by operator."""
    layer, _ = make_layer(CpuOps, BASE | {"dtype": torch.float32})
    assert layer.fused is None


def test_fused_layer_slot_outside_the_cache_is_refused():
    """A wrong slot raises instead of writing into somebody's memory."""
    layer, attention = make_layer(CpuOps, BASE)
    cache = attention.allocate(1)
    with pytest.raises(IndexError, match="slot"):
        run_one(layer, attention, cache, slot=BLOCK_SIZE)


def test_fused_layer_rows_that_do_not_match_the_step_are_refused():
    """As many rows as the step has tokens, in the layer's dtype."""
    layer, attention = make_layer(CpuOps, BASE)
    cache = attention.allocate(1)
    with pytest.raises(ValueError, match="x"):
        run_one(layer, attention, cache, rows=2)
    with pytest.raises(TypeError, match="float32"):
        run_one(layer, attention, cache, dtype=torch.float32)


@pytest.mark.parametrize(
    ("angles", "error"),
    [
        ((torch.ones(1, 8), torch.zeros(1, 8).double()), "sin is"),
        ((torch.ones(1, 7), torch.zeros(1, 7)), "7 pairs, expected 8"),
        ((torch.ones(2, 8), torch.zeros(2, 8)), "cos has the shape"),
    ],
)
def test_angles_that_do_not_fit_are_refused(angles, error):
    """A row of angles for each token, as many as the layer rotates."""
    layer, attention = make_layer(CpuOps, BASE)
    with pytest.raises((ValueError, TypeError), match=error):
        run_one(layer, attention, attention.allocate(1), angles=angles)


def run_one(layer, attention, cache, *, slot=0, rows=1, dtype=torch.bfloat16, angles=None):
    """One token of one request."""
    batch = AttentionBatch(
        query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
        seq_lens=torch.tensor([1], dtype=torch.int32),
        block_table=torch.zeros((1, 1), dtype=torch.int32),
        slot_mapping=torch.tensor([slot]),
        query_start_loc_host=[0, 1],
        seq_lens_host=[1],
        num_requests=1,
        num_tokens=1,
        max_query_len=1,
        max_seq_len=1,
    )
    x = torch.ones(rows, BASE["hidden"], dtype=dtype)
    out = x.new_empty((1, BASE["heads"], BASE["head_size"]))
    angles = angles or (torch.ones(1, BASE["pairs"]), torch.zeros(1, BASE["pairs"]))
    return layer.forward(x, x.clone(), angles, cache, attention.plan(batch), out)


@pytest.fixture
def three_threads():
    """More threads than some machines have cores: they must get by."""
    known = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(known)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("precision", ["plain", (8, 0), (4, 16)])
@pytest.mark.parametrize(
    "steps", [[[1, 0], [1, 1]], [[4, 4], [1, 1]], [[9, 3], [2, 1]], [[1500, 1], [1, 1]]]
)
def test_chained_layers_have_the_bits_of_layers_one_by_one(precision, steps):
    """One call for all layers, by threads that stay together, changes no bit of any layer.

    Products of this size and contexts of this length are shared among threads.
    """
    sizes = {"hidden": 512, "inner": 1024, "heads": 8, "head_size": 64, "pairs": 32}
    p = BASE | sizes | {"precision": precision, "steps": steps}
    layers = [make_layer(CpuOps, p | {"seed": seed}) for seed in range(3)]
    plain = [make_layer(OneByOne, p | {"seed": seed}) for seed in range(3)]
    places = [
        [MixingPlace(cache=index, plan=0, angles=rope)] for index, rope in enumerate([0, 1, 0])
    ]
    chain = CpuOps().chain_layers([layer.fused for layer, _ in layers], places)

    def chained(x, residual, angles, caches, plans):
        return chain(x, residual, angles, caches, plans[:1])

    def one_by_one(x, residual, angles, caches, plans):
        for (layer, _), rope, cache, plan in zip(plain, [0, 1, 0], caches, plans, strict=True):
            out = x.new_empty((len(x), p["heads"], p["head_size"]))
            x = layer.forward(x, residual, angles[rope], cache, plan, out)
        return x

    ours = run_layers(chained, [attention for _, attention in layers], p)
    theirs = run_layers(one_by_one, [attention for _, attention in plain], p)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_layers_of_another_device_are_not_chained():
    """A layer that the kernels did not fuse is called on its own."""
    (layer, _) = make_layer(CpuOps, BASE)
    places = [[MixingPlace(cache=index, plan=0)] for index in range(2)]
    assert CpuOps().chain_layers([layer.fused, object()], places) is None


def test_layers_that_share_angles_of_other_sizes_are_refused():
    """One rope has angles of one size."""
    layers = [make_layer(CpuOps, BASE | {"pairs": pairs})[0].fused for pairs in (8, 4)]
    places = [[MixingPlace(cache=index, plan=0)] for index in range(2)]
    with pytest.raises(ValueError, match="rope 0"):
        CpuOps().chain_layers(layers, places)


def test_step_of_a_mixer_is_refused_by_attention():
    """Rounds of states say nothing of keys."""
    layer, attention = make_layer(CpuOps, BASE)
    chain = CpuOps().chain_layers([layer.fused], [[MixingPlace(cache=0, plan=0)]])
    x = torch.ones(1, BASE["hidden"], dtype=torch.bfloat16)
    angles = [(torch.ones(1, BASE["pairs"]), torch.zeros(1, BASE["pairs"]))]
    with pytest.raises(ValueError, match="mixer"):
        chain(x, x.clone(), angles, [attention.allocate(1)], [[]])
