"""The compiled CPU kernels against float64, at every ISA level that this machine has."""

from __future__ import annotations

from dataclasses import dataclass

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
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
BOTH = [torch.float32, torch.bfloat16]
"""In bfloat16 a level may multiply pairs, a kernel of its own."""
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def isa(request):
    """Each level once; the best one is put back."""
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(kernels.available_isas()[0])


def assert_near(actual, expected, scale=1.0):
    """Equal up to rounding of the dtype: relative to the entry, with a floor of a part of the scale."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * scale)


# ------------------------------------------------------------------------------------------- attention


@dataclass
class Problem:
    """A batch with a cache whose unused slots hold NaN."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    contexts: list  # for each request its keys and values, [context, Hk, D] and [context, Hk, Dv]


def make_problem(lengths, *, heads, kv_heads, size, v_size=None, block_size, dtype, rng, hidden=0):
    """`lengths` lists (context, new tokens) of each request; the first `hidden` keys of each are NaN in the cache."""
    v_size = v_size or size
    blocks_of = [-(-context // block_size) for context, _ in lengths]
    num_blocks = sum(blocks_of) + 2
    order = torch.randperm(num_blocks, generator=rng).tolist()
    table = torch.full((len(lengths), max(blocks_of) + 1), -7, dtype=torch.int32)
    k_cache = torch.full((num_blocks, block_size, kv_heads, size), float("nan"), dtype=dtype)
    v_cache = torch.full((num_blocks, block_size, kv_heads, v_size), float("nan"), dtype=dtype)
    contexts = []
    for r, (context, _) in enumerate(lengths):
        table[r, : blocks_of[r]] = torch.tensor([order.pop() for _ in range(blocks_of[r])])
        k = torch.randn(context, kv_heads, size, generator=rng).to(dtype)
        v = torch.randn(context, kv_heads, v_size, generator=rng).to(dtype)
        positions = torch.arange(hidden, context)
        slots = table[r].long()[positions // block_size], positions % block_size
        k_cache[slots], v_cache[slots] = k[hidden:], v[hidden:]
        contexts.append((k, v))
    new = [n for _, n in lengths]
    q = torch.randn(sum(new), heads, size, generator=rng).to(dtype)
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
    seq_lens = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    return Problem(q, k_cache, v_cache, table, seq_lens, starts, contexts)


def oracle(p, *, scale, window=0, soft_cap=0.0, chunk=0, sinks=None, alibi_slopes=None):
    """The definition, row by row, in float64."""
    rows = []
    for r, (k, v) in enumerate(p.contexts):
        start, stop = p.query_start_loc[r : r + 2].tolist()
        group = p.q.shape[1] // k.shape[1]
        keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
        context = k.shape[0]
        for row in range(start, stop):
            position = context - (stop - row)
            first = max(
                0, position - window + 1 if window else 0, position // chunk * chunk if chunk else 0
            )
            seen = slice(first, position + 1)
            s = scale * torch.einsum("hd,jhd->hj", p.q[row].double(), keys[seen])
            s = soft_cap * torch.tanh(s / soft_cap) if soft_cap else s
            if alibi_slopes is not None:
                s = s + alibi_slopes.double()[:, None] * (
                    torch.arange(first, position + 1) - position
                )
            if sinks is not None:
                s = torch.cat([s, sinks.double()[:, None]], dim=1)
            weights = torch.softmax(s, dim=1)[:, : position + 1 - first]
            rows.append(torch.einsum("hj,jhd->hd", weights, values[seen]))
    return torch.stack(rows)


def attend(p, *, scale, window=0, soft_cap=0.0, **extra):
    """What the kernel says."""
    out = torch.full(
        (p.q.shape[0], p.q.shape[1], p.v_cache.shape[3]), float("nan"), dtype=p.q.dtype
    )
    kernels.paged_attention(
        p.q,
        p.k_cache,
        p.v_cache,
        p.block_table,
        p.seq_lens,
        p.query_start_loc,
        scale,
        window,
        soft_cap,
        out,
        **extra,
    )
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(14, 2, 64), (4, 4, 80), (3, 1, 20), (8, 2, 128)]
)
def test_attention_mixed_batch_equals_float64(isa, dtype, heads, kv_heads, size, torch_rng):
    """Decodes and prefills of one batch, over scattered blocks, with NaN wherever nothing was written."""
    lengths = [(300, 1), (1, 1), (64, 64), (97, 33), (700, 5), (16, 1)]
    p = make_problem(
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        block_size=16,
        dtype=dtype,
        rng=torch_rng,
    )
    scale = size**-0.5
    assert_near(attend(p, scale=scale), oracle(p, scale=scale))


@pytest.mark.parametrize("dtype", BOTH)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=4),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    size=st.integers(1, 40),
    v_size=st.integers(1, 40),
    block_size=st.sampled_from([1, 3, 16, 32]),
    window=st.sampled_from([0, 0, 1, 7, 33, 64]),
    chunk=st.sampled_from([0, 0, 13, 64]),
    soft_cap=st.sampled_from([0.0, 0.0, 2.0, 30.0]),
    has_sinks=st.booleans(),
    has_alibi=st.booleans(),
    seed=st.integers(0, 1000),
)
@SETTINGS
def test_attention_odd_shapes_equal_float64(
    isa,
    dtype,
    lengths,
    group,
    kv_heads,
    size,
    v_size,
    block_size,
    window,
    chunk,
    soft_cap,
    has_sinks,
    has_alibi,
    seed,
):
    """Any shape and any combination of features, not only those that vectors like."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [(old + new, new) for old, new in lengths]
    heads = group * kv_heads
    p = make_problem(
        lengths,
        heads=heads,
        kv_heads=kv_heads,
        size=size,
        v_size=v_size,
        block_size=block_size,
        dtype=dtype,
        rng=rng,
    )
    options = {"scale": 0.3, "window": window, "chunk": chunk, "soft_cap": soft_cap}
    options["sinks"] = torch.randn(heads, generator=rng) * 3 if has_sinks else None
    options["alibi_slopes"] = torch.rand(heads, generator=rng) if has_alibi else None
    assert_near(attend(p, **options), oracle(p, **options))


@pytest.mark.parametrize("dtype", BOTH)
def test_attention_keys_before_the_window_may_be_gone(isa, dtype, torch_rng):
    """Blocks that the window has left are free: their slots hold NaN and their table entries anything."""
    window, block_size = 48, 16
    lengths = [(400, 3), (300, 1)]
    p = make_problem(
        lengths,
        heads=4,
        kv_heads=2,
        size=32,
        block_size=block_size,
        dtype=dtype,
        rng=torch_rng,
        hidden=300 - 48,
    )
    p.block_table[:, : (300 - window) // block_size] = 1 << 30
    expected = oracle(p, scale=0.2, window=window)
    assert_near(attend(p, scale=0.2, window=window), expected)


@pytest.mark.parametrize("dtype", BOTH)
def test_attention_more_heads_in_a_group_than_rows_of_a_tile(isa, dtype, torch_rng):
    """One key head for 71 query heads (Falcon) is cut into tiles of heads."""
    p = make_problem(
        [(70, 3)], heads=142, kv_heads=2, size=16, block_size=8, dtype=dtype, rng=torch_rng
    )
    assert_near(attend(p, scale=0.25), oracle(p, scale=0.25))


@pytest.mark.parametrize("dtype", BOTH)
def test_attention_large_scores_do_not_overflow(isa, dtype, torch_rng):
    """Scores of several hundred and a sink above them stay finite."""
    p = make_problem(
        [(200, 2)], heads=2, kv_heads=1, size=16, block_size=16, dtype=dtype, rng=torch_rng
    )
    options = {"scale": 100.0, "sinks": torch.tensor([2000.0, -2000.0])}
    assert_near(attend(p, **options), oracle(p, **options), scale=100)


@pytest.mark.parametrize("dtype", BOTH)
def test_attention_result_does_not_depend_on_company_chunks_or_threads(isa, dtype, torch_rng):
    """A row is bitwise the same alone and in a batch, in one chunk and in three, on one thread and on two."""
    lengths = [(1300, 1300), (1500, 1)]
    p = make_problem(
        lengths, heads=6, kv_heads=2, size=32, block_size=16, dtype=dtype, rng=torch_rng
    )
    together = attend(p, scale=0.2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        on_two_threads = attend(p, scale=0.2)
        alone = attend(
            Problem(
                p.q[1300:],
                p.k_cache,
                p.v_cache,
                p.block_table[1:],
                p.seq_lens[1:],
                torch.tensor([0, 1], dtype=torch.int32),
                [],
            ),
            scale=0.2,
        )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, on_two_threads)
    assert torch.equal(together[1300:], alone)
    for start, stop in [(0, 500), (500, 1299), (1299, 1300)]:
        part = Problem(
            p.q[start:stop],
            p.k_cache,
            p.v_cache,
            p.block_table,
            torch.tensor([stop], dtype=torch.int32),
            torch.tensor([0, stop - start], dtype=torch.int32),
            [],
        )
        assert torch.equal(together[start:stop], attend(part, scale=0.2))


def test_attention_strided_views_are_read_in_place(isa, torch_rng):
    """q may be a slice of a packed projection, the caches two halves of one tensor."""
    p = make_problem(
        [(40, 4), (9, 1)],
        heads=4,
        kv_heads=2,
        size=16,
        block_size=8,
        dtype=torch.float32,
        rng=torch_rng,
    )
    expected = attend(p, scale=0.25)
    packed = torch.cat([p.q.flatten(1), torch.randn(5, 64)], dim=1)
    both = torch.stack([p.k_cache, p.v_cache], dim=1)
    heads_first = both.permute(0, 1, 3, 2, 4).contiguous().permute(0, 1, 3, 2, 4)
    p.q, p.k_cache, p.v_cache = packed[:, :64].view(5, 4, 16), heads_first[:, 0], heads_first[:, 1]
    assert torch.equal(attend(p, scale=0.25), expected)


def test_attention_wrong_arguments_are_refused(torch_rng):
    """Nothing out of bounds is read: not for shapes, not for dtypes, not for ids."""
    p = make_problem(
        [(40, 4)], heads=4, kv_heads=2, size=16, block_size=8, dtype=torch.float32, rng=torch_rng
    )
    p.block_table[0, 2] = 1000
    with pytest.raises(IndexError, match=r"block_table\[0, 2\] = 1000"):
        attend(p, scale=1.0)
    p.block_table[0, 2] = 0
    p.seq_lens[0] = 3
    with pytest.raises(ValueError, match=r"seq_lens\[0\] = 3"):
        attend(p, scale=1.0)
    p.seq_lens[0] = 40
    p.query_start_loc[1] = 5
    with pytest.raises(ValueError, match="query_start_loc"):
        attend(p, scale=1.0)
    p.v_cache = p.v_cache.half()
    with pytest.raises(TypeError, match="v_cache"):
        attend(p, scale=1.0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_write_cache_writes_the_slots_and_nothing_else(isa, dtype, slot_dtype, torch_rng):
    """Strided sources land in their slots; every other slot keeps its bits."""
    packed = torch.randn(7, 3 * 10 * 2, generator=torch_rng).to(dtype)
    k, v = (half.view(7, 3, 10) for half in packed.chunk(2, dim=1))
    k_cache, v_cache = (
        torch.full((4, 8, 3, 10), 9.0, dtype=dtype),
        torch.full((4, 3, 8, 10), 9.0, dtype=dtype),
    )
    v_cache = v_cache.transpose(1, 2)
    slots = torch.randperm(32, generator=torch_rng)[:7]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    expected_k[slots // 8, slots % 8], expected_v[slots // 8, slots % 8] = k, v
    kernels.write_cache(k, v, k_cache, v_cache, slots.to(slot_dtype))
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)
    with pytest.raises(IndexError, match="32 slots"):
        kernels.write_cache(k, v, k_cache, v_cache, slots + 32)


# ----------------------------------------------------------------------------------------- elementwise


def normed(x, weight, eps):
    """The RMS norm in float64."""
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", FLOATS)
@given(rows=st.integers(1, 5), width=st.integers(1, 70), seed=st.integers(0, 100))
@SETTINGS
def test_rms_norm_equals_float64(isa, dtype, rows, width, seed):
    """Any width; the input may be a slice and the output the input."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width + 3, generator=rng).to(dtype)[:, :width]
    weight = torch.randn(width, generator=rng).to(dtype)
    expected = normed(x, weight, 1e-5)
    kernels.rms_norm(x, weight, 1e-5, x)
    assert_near(x, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@given(rows=st.integers(1, 5), width=st.integers(1, 70), seed=st.integers(0, 100))
@SETTINGS
def test_add_rms_norm_rounds_the_sum_before_it_is_normalised(isa, dtype, rows, width, seed):
    """The residual becomes the rounded sum, exactly; the norm is that of the rounded sum."""
    rng = torch.Generator().manual_seed(seed)
    x, residual = torch.randn(2, rows, width, generator=rng).to(dtype)
    weight, out = torch.randn(width, generator=rng).to(dtype), torch.empty_like(x)
    total = x + residual
    kernels.add_rms_norm(x, residual, weight, 1e-6, out)
    assert torch.equal(residual, total)
    assert_near(out, normed(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_gated_activation_equals_float64(isa, dtype, kind, torch_rng):
    """From deep in the tails to zero."""
    gate = torch.cat([torch.linspace(-30, 30, 501), torch.randn(50, generator=torch_rng) * 0.1]).to(
        dtype
    )
    other = torch.randn(551, generator=torch_rng).to(dtype)
    x = torch.stack([torch.cat([gate, other]), torch.cat([other, gate])])
    out = torch.empty(2, 551, dtype=dtype)
    getattr(kernels, f"{kind}_and_mul")(x, out)
    y = x.double()[:, :551]
    if kind == "silu":
        expected = torch.nn.functional.silu(y)
    else:
        expected = torch.nn.functional.gelu(
            y, approximate="tanh" if kind == "gelu_tanh" else "none"
        )
    assert_near(out, expected * x.double()[:, 551:])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("is_interleaved", [False, True])
@given(pairs=st.integers(1, 40), rest=st.integers(0, 5), seed=st.integers(0, 100))
@SETTINGS
def test_rotary_equals_float64_and_leaves_the_rest(isa, dtype, is_interleaved, pairs, rest, seed):
    """Only the first 2F features of each head turn; the heads are slices of a packed projection."""
    rng = torch.Generator().manual_seed(seed)
    size, tokens = 2 * pairs + rest, 3
    packed = torch.randn(tokens, 3 * size, generator=rng).to(dtype)
    q, k = packed[:, : 2 * size].view(tokens, 2, size), packed[:, 2 * size :].view(tokens, 1, size)
    angles = torch.randn(tokens, pairs, generator=rng)
    cos, sin = angles.cos(), angles.sin()
    expected = [x.double() for x in (q, k)]
    for x in expected:
        first, second = (
            (x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2])
            if is_interleaved
            else (x[..., :pairs], x[..., pairs : 2 * pairs])
        )
        a, b, c, s = first.clone(), second.clone(), cos.double()[:, None], sin.double()[:, None]
        first.copy_(a * c - b * s)
        second.copy_(b * c + a * s)
    kernels.rotary(q, k, cos, sin, is_interleaved=is_interleaved)
    assert_near(q, expected[0])
    assert_near(k, expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_of_every_half_is_exact_and_back(isa, dtype):
    """All 65536 bit patterns survive a sum with zero: subnormals, infinities and NaN."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(256, 256)
    residual = torch.zeros_like(x)
    kernels.add_rms_norm(x, residual, torch.ones(256, dtype=dtype), 1e-6, torch.empty_like(x))
    assert torch.equal(residual.isnan(), x.isnan())
    assert torch.equal(residual.nan_to_num(1.0), x.nan_to_num(1.0))


def test_use_isa_unknown_name_is_refused():
    """A misspelt level is an error, not a fall-back."""
    with pytest.raises(ValueError, match="mmx"):
        kernels.use_isa("mmx")
