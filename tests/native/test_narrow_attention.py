"""Attention over caches of eight bits and over latents, against what the reference stores."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
kernels = pytest.importorskip("quire.kernels_cpu")

from quire.backends.cpu.attention import CpuAttention  # noqa: E402
from quire.backends.reference import ReferenceAttention  # noqa: E402
from quire.core.interface import AttentionBatch, AttentionSpec  # noqa: E402

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not kernels.HAVE_NATIVE, reason=str(kernels.WHY_NOT_NATIVE)),
]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
BLOCK_SIZE = 4
NARROW = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


@pytest.fixture(params=kernels.available_isas() if kernels.HAVE_NATIVE else ["none"])
def isa(request):
    """Each level once; the best one is put back."""
    kernels.use_isa(request.param)
    yield request.param
    kernels.use_isa(kernels.available_isas()[0])


def attend(backend, spec, steps, lengths, tensors):
    """The results of all steps; each takes so many new tokens of every request."""
    attention = backend(spec)
    blocks_each = -(-max(lengths) // BLOCK_SIZE)
    cache = attention.allocate(blocks_each * len(lengths) + 1)
    table = torch.randperm(
        blocks_each * len(lengths), generator=torch.Generator().manual_seed(5)
    ).view(len(lengths), -1)
    done, results = [0] * len(lengths), []
    for new in steps:
        starts = [0, *torch.tensor(new).cumsum(0).tolist()]
        rows, slots = [], []
        for r, n in enumerate(new):
            positions = torch.arange(done[r], done[r] + n)
            rows.append((r, positions))
            slots.append(table[r][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
            done[r] += n
        q, k, v = (torch.cat([t[r][where] for r, where in rows]) for t in tensors)
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
        out = torch.empty(len(q), spec.num_heads, spec.v_head_size, dtype=q.dtype)
        results.append(attention.forward(q, k, v, cache, attention.plan(batch), out).clone())
    return torch.cat(results), cache, attention


def make_spec(dtype, cache_dtype, *, kind="causal", heads=4, kv_heads=2, size=20, v_size=20):
    """A small spec with sizes that no vector divides."""
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        v_head_size=v_size,
        scale=size**-0.5,
        dtype=dtype,
        cache_dtype=cache_dtype,
        block_size=BLOCK_SIZE,
        kind=kind,
    )


def draw(spec, lengths, rng, scale=1.0):
    """q, k and v of every request."""
    shapes = (
        (spec.num_heads, spec.head_size),
        (spec.num_kv_heads, spec.head_size),
        (spec.num_kv_heads, spec.v_head_size),
    )
    dtype = getattr(torch, spec.dtype)
    return [
        [(torch.randn(n, *shape, generator=rng) * scale).to(dtype) for n in lengths]
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cache_dtype", [*NARROW, "plain"])
@pytest.mark.parametrize("kind", ["causal", "mla"])
def test_narrow_and_latent_attention_equal_the_reference(isa, dtype, cache_dtype, kind, torch_rng):
    """Prompts in chunks and decoded tokens: the results, and every bit that is stored."""
    cache_dtype = dtype if cache_dtype == "plain" else cache_dtype
    sizes = {"heads": 6, "kv_heads": 1, "size": 37, "v_size": 21} if kind == "mla" else {}
    spec = make_spec(dtype, cache_dtype, kind=kind, **sizes)
    lengths = [70, 9, 33]
    tensors = draw(spec, lengths, torch_rng, scale=2.0)
    steps = ([60, 8, 30], [1, 1, 1], [1, 0, 1])
    got, cache, attention = attend(CpuAttention, spec, steps, lengths, tensors)
    wanted, truth, _ = attend(ReferenceAttention, spec, steps, lengths, tensors)
    assert attention.provider().startswith("native")
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=2 * tolerance)
    assert cache.tensors.keys() == truth.tensors.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", NARROW)
def test_write_cache_stores_the_bits_of_the_reference(isa, dtype, cache_dtype, torch_rng):
    """Subnormals, ties, zeros and what is too large round as torch rounds them."""
    x = torch.randn(64, 2, 37, generator=torch_rng)
    x = (x * torch.logspace(-8, 7, 64)[:, None, None]).to(dtype)
    x[3] = 0
    x[5, 0, :4] = torch.tensor([0.0, -0.0, 2.0**-10, -(2.0**-17)])
    spec = make_spec(str(dtype).removeprefix("torch."), cache_dtype, size=37, v_size=37)
    reference = ReferenceAttention(spec)
    ours, truth = reference.allocate(16), reference.allocate(16)
    slots = torch.randperm(64, generator=torch_rng)
    reference._codec.write(truth.tensors, "k", slots, x)
    scales = ours.tensors.get("k_scale")
    kernels.write_cache(x, None, ours.tensors["k"], None, slots, k_scales=scales)
    assert torch.equal(ours.tensors["k"].view(torch.uint8), truth.tensors["k"].view(torch.uint8))
    if scales is not None:
        assert torch.equal(scales, truth.tensors["k_scale"])


@pytest.mark.parametrize("cache_dtype", NARROW)
def test_every_code_of_eight_bits_is_read_as_torch_reads_it(isa, cache_dtype):
    """All 256 codes, each as the only value that its token sees."""
    name = NARROW[cache_dtype]
    codes = torch.arange(256, dtype=torch.uint8).view(name)
    k_cache = torch.zeros(256, 1, 1, 1, dtype=torch.uint8).view(name)
    v_cache = codes.view(256, 1, 1, 1)
    scales = torch.ones(256, 1, 1) if cache_dtype == "int8" else None
    out = torch.empty(256, 1, 1)
    kernels.paged_attention(
        torch.ones(256, 1, 1),
        k_cache,
        v_cache,
        torch.arange(256, dtype=torch.int32).view(256, 1),
        torch.ones(256, dtype=torch.int32),
        torch.arange(257, dtype=torch.int32),
        1.0,
        0,
        0.0,
        out,
        k_scales=scales,
        v_scales=scales,
    )
    torch.testing.assert_close(out.flatten(), codes.float(), rtol=0, atol=0, equal_nan=True)


def test_int8_cache_without_scales_is_refused(isa):
    """Without them the numbers mean nothing."""
    k = torch.zeros(1, 1, 8)
    cache = torch.zeros(1, 1, 1, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="scales"):
        kernels.write_cache(k, k, cache, cache, torch.zeros(1, dtype=torch.int64))
