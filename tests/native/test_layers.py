"""Experts, recurrences and the vocabulary in C++, against the formulas in float64."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from quire.backends.cpu.ops import CpuOps  # noqa: E402
from quire.backends.reference import ReferenceOps  # noqa: E402
from quire.core.interface import (  # noqa: E402
    ExpertWeights,
    RoutingSpec,
    SamplingTensors,
    Sequences,
)

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SETTINGS = settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRUTH = ReferenceOps()


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def ops(request):
    """The operators at each level; the best one is put back."""
    kernels.use_isa(request.param)
    yield CpuOps()
    kernels.use_isa(kernels.available_isas()[0])


def near(actual, expected, dtype):
    """Within the rounding of the dtype, relative to the largest entry."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * scale
    )


def sequences_of(lengths):
    """Sequences of these lengths, one after the other."""
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Sequences(starts=torch.tensor(starts, dtype=torch.int32), starts_host=starts)


# --- experts --------------------------------------------------------------------------------------


def make_experts(rng, dtype, count, hidden, inner, activation="silu", has_bias=False):
    """Random experts of a layer."""

    def draw(*shape):
        return (torch.randn(*shape, generator=rng) / shape[-1] ** 0.5).to(dtype)

    return ExpertWeights(
        gate_up=draw(count, 2 * inner, hidden),
        down=draw(count, hidden, inner),
        gate_up_bias=draw(count, 2 * inner) if has_bias else None,
        down_bias=draw(count, hidden) if has_bias else None,
        activation=activation,
    )


def in_double(w):
    """The same experts in float64."""
    wide = [None if t is None else t.double() for t in (w.gate_up_bias, w.down_bias)]
    return ExpertWeights(
        gate_up=w.gate_up.double(),
        down=w.down.double(),
        gate_up_bias=wide[0],
        down_bias=wide[1],
        activation=w.activation,
    )


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    tokens=st.integers(0, 40),
    count=st.integers(1, 9),
    hidden=st.integers(1, 90),
    inner=st.integers(1, 90),
    activation=st.sampled_from(["silu", "gelu_tanh", "gelu", "clamped_swiglu"]),
    has_bias=st.booleans(),
    weighs_input=st.booleans(),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_experts_odd_shapes_equal_float64(
    ops, dtype, tokens, count, hidden, inner, activation, has_bias, weighs_input, seed
):
    """Every token is the weighted sum of its experts, whoever else chose them."""
    rng = torch.Generator().manual_seed(seed)
    weights = make_experts(rng, dtype, count, hidden, inner, activation, has_bias)
    x = torch.randn(tokens, hidden, generator=rng).to(dtype)
    chosen = torch.rand(tokens, count, generator=rng).argsort(-1)[:, : min(3, count)]
    shares = torch.rand(chosen.shape, generator=rng)
    packed = ops.pack_experts(weights)
    assert packed.format.startswith("native")
    got = ops.experts(x, packed, shares, chosen, weighs_input=weighs_input)
    wide = TRUTH.pack_experts(in_double(weights))
    wanted = TRUTH.experts(x.double(), wide, shares.double(), chosen, weighs_input=weighs_input)
    near(got, wanted, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_alone_equal_the_same_in_a_batch_of_many_waves(ops, dtype, torch_rng):
    """A token has the same bits alone and among more pairs than are taken at a time."""
    packed = ops.pack_experts(make_experts(torch_rng, dtype, 5, 33, 17))
    x = torch.randn(900, 33, generator=torch_rng).to(dtype)
    chosen = torch.rand(900, 5, generator=torch_rng).argsort(-1)[:, :3]
    shares = torch.rand(900, 3, generator=torch_rng)
    together = ops.experts(x, packed, shares, chosen)
    for t in (0, 1, 450, 899):
        alone = ops.experts(x[t : t + 1], packed, shares[t : t + 1], chosen[t : t + 1])
        assert torch.equal(alone[0], together[t])


def test_experts_unknown_id_is_refused(ops, torch_rng):
    """An id past the end would read another layer's weights."""
    packed = ops.pack_experts(make_experts(torch_rng, torch.float32, 2, 8, 8))
    with pytest.raises(IndexError, match="expert 2"):
        ops.experts(torch.zeros(1, 8), packed, torch.ones(1, 1), torch.tensor([[2]]))


@given(
    tokens=st.integers(0, 9),
    groups=st.sampled_from([1, 2, 4]),
    each=st.integers(2, 9),
    score=st.sampled_from(["softmax", "sigmoid"]),
    group_score=st.sampled_from(["max", "top2"]),
    has_bias=st.booleans(),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_route_experts_equals_reference(
    ops, tokens, groups, each, score, group_score, has_bias, seed
):
    """The same experts, ties and groups included, and their weights."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, groups * each, generator=rng)
    logits[:, ::3] = 0.5  # ties
    bias = torch.randn(groups * each, generator=rng) if has_bias else None
    spec = RoutingSpec(
        num_experts=groups * each,
        num_chosen=2,
        score=score,
        scale=1.5,
        num_groups=groups,
        num_kept_groups=max(1, groups // 2),
        group_score=group_score,
    )
    weights, ids = ops.route_experts(logits, spec, bias)
    wanted_weights, wanted_ids = TRUTH.route_experts(logits, spec, bias)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 4),
    num_outputs=st.integers(1, 70),
    num_inputs=st.one_of(st.integers(1, 70), st.integers(120, 140)),
    is_transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_head_linear_equals_float64(
    ops, dtype, tokens, heads, num_outputs, num_inputs, is_transposed, seed
):
    """Each head by its own weights, which lie either way, from a view of wider rows."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads, num_inputs + 3, generator=rng).to(dtype)[..., 1:-2]
    weight = torch.randn(heads, num_outputs, num_inputs, generator=rng).to(dtype)
    lies = weight.mT.contiguous().mT if is_transposed else weight
    out = ops.head_linear(x, lies)
    near(out, TRUTH.head_linear(x.double(), weight.double()), dtype)
    for token in range(tokens):  # alone and in a batch: the same bits
        assert torch.equal(ops.head_linear(x[token : token + 1], lies), out[token : token + 1])


# --- recurrence -----------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=4)
SOME_LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=4)  # torch cannot unfold none


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    lengths=SOME_LENGTHS,
    channels=st.integers(1, 40),
    taps=st.integers(2, 6),
    has_bias=st.booleans(),
    activation=st.sampled_from(["", "silu"]),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_causal_conv1d_equals_float64(
    ops, dtype, lengths, channels, taps, has_bias, activation, seed
):
    """Results and the inputs that are kept, for sequences shorter than the window too."""
    rng = torch.Generator().manual_seed(seed)
    where = sequences_of(lengths)
    x = torch.randn(sum(lengths), channels + 2, generator=rng).to(dtype)[:, 1:-1]
    weight = torch.randn(channels, taps, generator=rng).to(dtype)
    bias = torch.randn(channels, generator=rng).to(dtype) if has_bias else None
    states = torch.randn(len(lengths), channels, taps - 1, generator=rng).to(dtype)
    wide = states.double()
    wanted = TRUTH.causal_conv1d(
        x.double(),
        weight.double(),
        None if bias is None else bias.double(),
        wide,
        where,
        activation=activation,
    )
    got = ops.causal_conv1d(x, weight, bias, states, where, activation=activation)
    near(got, wanted, dtype)
    assert torch.equal(states.double(), wide)


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    lengths=LENGTHS,
    channels=st.integers(1, 40),
    size=st.integers(1, 20),
    has_d=st.booleans(),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_selective_scan_equals_float64(ops, dtype, lengths, channels, size, has_d, seed):
    """Results and states after sequences of all lengths, none included."""
    rng = torch.Generator().manual_seed(seed)
    where, total = sequences_of(lengths), sum(lengths)
    x = torch.randn(total, channels, generator=rng).to(dtype)
    dt = torch.rand(total, channels, generator=rng)
    a = -torch.rand(channels, size, generator=rng)
    b, c = torch.randn(total, 2 * size, generator=rng).to(dtype).chunk(2, dim=-1)
    d = torch.randn(channels, generator=rng) if has_d else None
    states = torch.randn(len(lengths), channels, size, generator=rng)
    wide = states.double()
    wanted = TRUTH.selective_scan(
        *(t.double() for t in (x, dt, a, b, c)), None if d is None else d.double(), wide, where
    )
    near(ops.selective_scan(x, dt, a, b, c, d, states, where), wanted, dtype)
    near(states, wide, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    lengths=LENGTHS,
    groups=st.integers(1, 2),
    share=st.integers(1, 2),
    channels=st.integers(1, 36),
    size=st.integers(1, 36),
    has_d=st.booleans(),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_ssd_scan_equals_float64(ops, dtype, lengths, groups, share, channels, size, has_d, seed):
    """Results and states, with heads that share their group and padded sizes."""
    rng = torch.Generator().manual_seed(seed)
    where, total, heads = sequences_of(lengths), sum(lengths), groups * share
    x = torch.randn(total, heads, channels, generator=rng).to(dtype)
    dt = torch.rand(total, heads, generator=rng)
    a = -torch.rand(heads, generator=rng)
    b, c = torch.randn(2, total, groups, size, generator=rng).to(dtype)
    d = torch.randn(heads, generator=rng) if has_d else None
    states = torch.randn(len(lengths), heads, channels, size, generator=rng)
    wide = states.double()
    wanted = TRUTH.ssd_scan(
        *(t.double() for t in (x, dt, a, b, c)), None if d is None else d.double(), wide, where
    )
    near(ops.ssd_scan(x, dt, a, b, c, d, states, where), wanted, dtype)
    near(states, wide, torch.float32)


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    lengths=LENGTHS,
    groups=st.integers(1, 2),
    share=st.integers(1, 2),
    v_size=st.integers(1, 40),
    size=st.integers(1, 36),
    seed=st.integers(0, 99),
)
@SETTINGS
def test_gated_delta_rule_equals_float64(ops, dtype, lengths, groups, share, v_size, size, seed):
    """Results and states, with keys normalised as models have them."""
    rng = torch.Generator().manual_seed(seed)
    where, total, heads = sequences_of(lengths), sum(lengths), groups * share
    q, k = torch.nn.functional.normalize(
        torch.randn(2, total, groups, size, generator=rng), dim=-1
    ).to(dtype)
    v = torch.randn(total, heads, v_size, generator=rng).to(dtype)
    decay, beta = -torch.rand(total, heads, generator=rng), torch.rand(total, heads, generator=rng)
    states = torch.randn(len(lengths), heads, size, v_size, generator=rng)
    wide = states.double()
    wanted = TRUTH.gated_delta_rule(*(t.double() for t in (q, k, v, decay, beta)), wide, where)
    near(ops.gated_delta_rule(q, k, v, decay, beta, states, where), wanted, dtype)
    near(states, wide, torch.float32)


def test_scans_of_a_prompt_cut_anywhere_are_bitwise_the_same(ops, torch_rng):
    """A chunked prompt and a prefix that was found give the same bits as the whole prompt."""
    total, heads, size = 50, 2, 20
    x, k, q = torch.randn(3, total, heads, size, generator=torch_rng)
    dt, beta = torch.rand(2, total, heads, generator=torch_rng)
    a = -torch.rand(heads, generator=torch_rng)

    def run(cuts):
        ssd = torch.zeros(1, heads, size, size)
        delta = torch.zeros(1, heads, size, size)
        parts = []
        for begin, end in cuts:
            where, rows = sequences_of([end - begin]), slice(begin, end)
            parts.append(
                ops.ssd_scan(x[rows], dt[rows], a, k[rows], q[rows], None, ssd, where)
                + ops.gated_delta_rule(
                    q[rows], k[rows], x[rows], -dt[rows], beta[rows], delta, where
                )
            )
        return torch.cat(parts), ssd, delta

    whole = run([(0, total)])
    cut = run([(0, 7), (7, 40), (40, 41), (41, total)])
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


@settings(SETTINGS, max_examples=30)
@given(
    size=st.sampled_from([4, 8, 16, 20, 32, 128]),
    channels=st.sampled_from([1, 8, 16, 20, 32, 64, 72]),
    dtype=st.sampled_from(FLOATS),
    has_d=st.booleans(),
    is_new=st.booleans(),
    seed=st.integers(0, 999),
)
def test_steps_alone_are_bitwise_those_of_a_prompt(ops, size, channels, dtype, has_d, is_new, seed):
    """Each token decoded for itself, states as they lie in memory, is what a pass over all gives."""
    rng = torch.Generator().manual_seed(seed)
    total, heads = 9, 2
    x = torch.randn(total, heads, channels, generator=rng).to(dtype)
    k, q = (t.to(dtype) for t in torch.randn(2, total, 1, size, generator=rng))
    dt = torch.rand(total, heads * channels, generator=rng)
    rates = -torch.rand(heads * channels, size, generator=rng)
    d = torch.randn(heads * channels, generator=rng) if has_d else None

    def run(step):
        make = torch.zeros if is_new else partial(torch.randn, generator=_seeded(seed))
        states = {
            "sel": make(1, heads * channels, size),
            "ssd": make(1, heads, channels, size),
            "delta": make(1, heads, size, channels),
        }
        parts = []
        for begin in range(0, total, step):
            rows = slice(begin, min(begin + step, total))
            where = sequences_of([rows.stop - begin])
            times = dt[rows]
            flat, b, c = x[rows].flatten(1), k[rows].squeeze(1), q[rows].squeeze(1)
            selected = ops.selective_scan(flat, times, rates, b, c, d, states["sel"], where)
            head_d = None if d is None else d[:heads]
            times = times[:, :heads].contiguous()
            steps = (times, rates[:heads, 0].contiguous(), k[rows], q[rows], head_d)
            scanned = ops.ssd_scan(x[rows], *steps, states["ssd"], where)
            recalled = ops.gated_delta_rule(
                q[rows], k[rows], x[rows], -times, times, states["delta"], where
            )
            parts.append(torch.cat([selected, scanned.flatten(1), recalled.flatten(1)], dim=1))
        return [torch.cat(parts), *states.values()]

    for whole, alone in zip(run(total), run(1), strict=True):
        assert torch.equal(whole, alone)


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


# --- vocabulary -----------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 4),
    vocab_size=st.one_of(st.integers(1, 400), st.integers(9000, 40000)),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    step=st.sampled_from([0.0, 0.5]),
    forbidden=st.sampled_from([0.0, 0.5, 0.9999]),
    seed=st.integers(0, 9999),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_sample_equals_the_filters_in_float64(ops, rows, vocab_size, spread, step, forbidden, seed):
    """Ties, masked tokens and all filters together choose what a sort in float64 chooses."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=rng) * spread
    if step:
        logits = (logits / step).round() * step
    is_forbidden = torch.rand(logits.shape, generator=rng) < forbidden
    is_forbidden[:, vocab_size // 2] = False
    logits.masked_fill_(is_forbidden, float("-inf"))

    def pick(*values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=rng)]

    chosen = SamplingTensors(
        temperature=pick(0.0, 0.7, 1.0, 1.5),
        top_k=pick(1, 2, 40, 300, vocab_size).clamp(max=vocab_size),
        top_p=pick(0.1, 0.5, 0.9, 1.0),
        min_p=pick(0.0, 0.0, 0.03, 0.2),
        uniform=torch.rand(rows, generator=rng),
        is_all_greedy=False,
        needs_filter=True,
    )
    got = ops.sample(logits.clone(), chosen)
    for row in range(rows):
        assert int(got[row]) in acceptable(logits[row], chosen, row)


def acceptable(logits, chosen, row):
    """What `Ops.sample` allows for one row: the formula at u and a hair to both of its sides."""
    temperature = float(chosen.temperature[row])
    if temperature == 0:
        return {int(logits.argmax())}
    p = torch.softmax(logits.double() / temperature, dim=-1)
    order = logits.argsort(descending=True, stable=True)
    ids = set()
    top_p, min_p = float(chosen.top_p[row]), float(chosen.min_p[row])
    for slack in (-1e-6, 0.0, 1e-6):
        ranked = p[order]
        border = logits[order][int(chosen.top_k[row]) - 1]
        kept = logits[order] >= border
        mass = (ranked * kept).sum()
        before = (ranked * kept).cumsum(0) - ranked * kept
        kept &= (before < (top_p + slack) * mass) | (top_p >= 1)
        kept &= ranked >= (min_p * (1 + slack)) * ranked[0]
        weights = torch.zeros_like(p)
        weights[order] = ranked * kept
        running = weights.cumsum(0)
        for nudge in (-1e-6, 0.0, 1e-6):
            target = (float(chosen.uniform[row]) + nudge) * running[-1]
            above = (running > target) & (weights > 0)
            if above.any():
                ids.add(int(above.nonzero()[0]))
            else:
                ids.add(int((weights > 0).nonzero()[-1]))
    return ids


@given(
    rows=st.integers(1, 3),
    vocab_size=st.one_of(st.integers(1, 300), st.integers(9000, 30000)),
    num_top=st.sampled_from([0, 1, 5, 20, 150]),
    step=st.sampled_from([0.0, 1.0]),
    forbidden=st.sampled_from([0.0, 0.999]),
    seed=st.integers(0, 999),
)
@SETTINGS
def test_logprobs_equal_float64(ops, rows, vocab_size, num_top, step, forbidden, seed):
    """Values, ranks with ties, and the best by lowest id."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=rng) * 3
    logits = (logits / step).round() * step if step else logits
    logits[torch.rand(logits.shape, generator=rng) < forbidden] = float("-inf")
    logits[:, vocab_size // 2] = 1.0
    tokens = torch.randint(vocab_size, (rows,), generator=rng)
    got = ops.logprobs(logits, tokens, num_top)
    wanted = TRUTH.logprobs(logits.double(), tokens, num_top)
    assert torch.equal(got.ranks, wanted.ranks)
    assert torch.equal(got.top_ids, wanted.top_ids)
    torch.testing.assert_close(got.selected.double(), wanted.selected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.top_logprobs.double(), wanted.top_logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab_size", [1, 7, 1023, 1024, 1025, 5000])
def test_most_likely_of_the_heads_own_logits_is_that_of_wide_ones(
    ops, dtype, vocab_size, torch_rng
):
    """Every tail and block of the one pass: lowest of ties, and rows without a number are told."""
    logits = (torch.randn(9, vocab_size, generator=torch_rng) * 3).to(dtype)
    logits[0, vocab_size // 2 :] = logits[0].max() + 1
    logits[1, -1], logits[2, 0] = torch.nan, torch.inf
    logits[3] = -torch.inf
    logits[4, : vocab_size - 1] = -torch.inf
    out, is_broken = torch.full((9,), -1), torch.zeros(9, dtype=torch.bool)
    assert ops.most_likely(logits, out, is_broken)
    wide = logits.double()
    assert is_broken.tolist() == (~torch.isfinite(wide.amax(-1))).tolist()
    largest = (wide == wide.amax(-1, keepdim=True)).int().argmax(-1)
    assert out.tolist() == largest.masked_fill(is_broken, 0).tolist()


def test_most_likely_of_ties_is_the_lowest_and_nan_is_first(ops):
    """As torch's argmax has it, at the borders of blocks too."""
    logits = torch.zeros(3, 1000)
    logits[0, [128, 999]] = 2.0
    logits[1, 700] = float("nan")
    logits[2] = float("-inf")
    greedy = SamplingTensors(
        temperature=torch.zeros(3),
        top_k=torch.full((3,), 1000),
        top_p=torch.ones(3),
        min_p=torch.zeros(3),
        uniform=torch.zeros(3),
        is_all_greedy=True,
        needs_filter=False,
    )
    assert ops.sample(logits, greedy).tolist() == [128, 700, 0]


@given(vocab_size=st.integers(1, 200), rows=st.integers(1, 5), seed=st.integers(0, 99))
@SETTINGS
def test_apply_token_mask_equals_reference(ops, vocab_size, rows, seed):
    """Only the rows that are named change, and the last word's spare bits mean nothing."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=rng)
    chosen = torch.randperm(rows, generator=rng)[: max(1, rows // 2)]
    words = -(-vocab_size // 32)
    mask = torch.randint(-(2**31), 2**31, (len(chosen), words), generator=rng).int()
    wanted = logits.clone()
    TRUTH.apply_token_mask(wanted, chosen, mask)
    ops.apply_token_mask(logits, chosen, mask)
    assert torch.equal(logits, wanted)
