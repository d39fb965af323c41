"""The reference attention against a loop in float64, one token and one head at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire import kernels_cpu
from quire.backends.cpu.attention import CpuAttention
from quire.backends.reference import ReferenceAttention
from quire.core.interface import AttentionBatch, AttentionSpec, LayerCache

SPEC = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    v_head_size=8,
    scale=0.3,
    dtype="float32",
    cache_dtype="float32",
    block_size=4,
)
TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass
class Case:
    """All tokens of some requests, and a cache whose blocks they own in a random order."""

    spec: AttentionSpec
    seq_lens: list[int]
    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    tables: list[list[int]]
    num_blocks: int
    extras: dict[str, torch.Tensor]


def make_case(spec: AttentionSpec, seq_lens: list[int], rng: torch.Generator) -> Case:
    """Random tokens; block 0 is the one that nobody owns."""
    dtype = getattr(torch, spec.dtype)

    def randn(*shape: int) -> list[torch.Tensor]:
        return [torch.randn((n, *shape), generator=rng).to(dtype) for n in seq_lens]

    counts = [math.ceil(n / spec.block_size) for n in seq_lens]
    ids = (torch.randperm(sum(counts) + 3, generator=rng) + 1).tolist()
    extras = {}
    if spec.has_sinks:
        extras["sinks"] = torch.randn(spec.num_heads, generator=rng)
    if spec.has_alibi:
        extras["alibi_slopes"] = torch.rand(spec.num_heads, generator=rng)
    return Case(
        spec=spec,
        seq_lens=seq_lens,
        q=randn(spec.num_heads, spec.head_size),
        k=randn(spec.num_kv_heads, spec.head_size),
        v=randn(spec.num_kv_heads, spec.v_head_size),
        tables=[[ids.pop() for _ in range(count)] for count in counts],
        num_blocks=sum(counts) + 4,
        extras=extras,
    )


def oracle(case: Case, request: int) -> torch.Tensor:
    """Attention of every token of one request by its definition: float64 [n, Hq, Dv]."""
    spec = case.spec
    cache_dtype = getattr(torch, spec.cache_dtype)
    q = case.q[request].double()
    k, v = (t[request].to(cache_dtype).double() for t in (case.k, case.v))
    out = torch.zeros((len(q), spec.num_heads, spec.v_head_size), dtype=torch.float64)
    for p in range(len(q)):
        for h in range(spec.num_heads):
            g = h // (spec.num_heads // spec.num_kv_heads)
            seen = [j for j in range(p + 1) if _sees(spec, p, j)]
            scores = torch.stack([spec.scale * (q[p, h] @ k[j, g]) for j in seen])
            if spec.soft_cap is not None:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            if spec.has_alibi:
                back = torch.tensor([float(p - j) for j in seen], dtype=torch.float64)
                scores = scores - case.extras["alibi_slopes"][h].double() * back
            weights = scores.exp()
            total = weights.sum()
            if spec.has_sinks:
                total = total + case.extras["sinks"][h].double().exp()
            out[p, h] = sum(w * v[j, g] for w, j in zip(weights, seen, strict=True)) / total
    return out


def _sees(spec: AttentionSpec, p: int, j: int) -> bool:
    if spec.kind == "sliding_window":
        return j > p - spec.window
    if spec.kind == "chunked":
        return j // spec.window == p // spec.window
    return True


def make_batch(case: Case, ranges: list[tuple[int, int]], garbage: int = 0) -> AttentionBatch:
    """A step that computes tokens [begin, end) of each request; undefined entries are `garbage`."""
    spec, size = case.spec, case.spec.block_size
    starts, seq_lens = [0], []
    slots: list[int] = []
    width = max(len(table) for table in case.tables) + 2
    block_table = torch.full((len(ranges), width), garbage, dtype=torch.int32)
    for r, (begin, end) in enumerate(ranges):
        starts.append(starts[-1] + end - begin)
        seq_lens.append(end)
        table = case.tables[r]
        slots += [table[t // size] * size + t % size for t in range(begin, end)]
        first = 0
        if spec.kind == "sliding_window":
            first = max(0, begin - spec.window + 1) // size
        for b in range(first, math.ceil(end / size)):
            block_table[r, b] = table[b]
    return AttentionBatch(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_table=block_table,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_start_loc_host=starts,
        seq_lens_host=seq_lens,
        num_requests=len(ranges),
        num_tokens=starts[-1],
        max_query_len=max(end - begin for begin, end in ranges),
        max_seq_len=max(seq_lens),
    )


def nan_cache(attention: ReferenceAttention, case: Case) -> LayerCache:
    """A cache in which every slot that nobody wrote is poison."""
    cache = attention.allocate(case.num_blocks)
    for tensor in cache.tensors.values():
        tensor.fill_(float("nan"))
    return cache


def run(attention, case, cache, ranges, garbage=0) -> list[torch.Tensor]:
    """The output of one step, cut into requests."""
    q, k, v = (
        torch.cat([t[r][begin:end] for r, (begin, end) in enumerate(ranges)])
        for t in (case.q, case.k, case.v)
    )
    out = torch.full(
        (len(q), case.spec.num_heads, case.spec.v_head_size), float("nan"), dtype=q.dtype
    )
    plan = attention.plan(make_batch(case, ranges, garbage))
    assert attention.forward(q, k, v, cache, plan, out, **case.extras) is out
    return list(out.split([end - begin for begin, end in ranges]))


def check(
    spec: AttentionSpec, seq_lens: list[int], steps, rng, attention_class=ReferenceAttention
) -> None:
    """Runs `steps`, each a list of ranges, and compares every output row with the oracle."""
    case = make_case(spec, seq_lens, rng)
    attention = attention_class(spec, "cpu")
    cache = nan_cache(attention, case)
    wanted = [oracle(case, r) for r in range(len(seq_lens))]
    for ranges in steps:
        for r, got in enumerate(run(attention, case, cache, ranges, garbage=0)):
            begin, end = ranges[r]
            torch.testing.assert_close(
                got.double(),
                wanted[r][begin:end],
                rtol=TOLERANCES[spec.dtype],
                atol=TOLERANCES[spec.dtype],
            )


VARIANTS = {
    "plain": {},
    "multi_head": {"num_heads": 2},
    "multi_query": {"num_kv_heads": 1},
    "other_value_size": {"v_head_size": 5},
    "window": {"kind": "sliding_window", "window": 5},
    "window_of_one": {"kind": "sliding_window", "window": 1},
    "chunked": {"kind": "chunked", "window": 6},
    "soft_cap": {"soft_cap": 1.5},
    "sinks": {"has_sinks": True},
    "alibi": {"has_alibi": True},
    "all_at_once": {
        "kind": "sliding_window", "window": 6, "soft_cap": 2.0, "has_sinks": True,
        "has_alibi": True, "v_head_size": 4,
    },
    "bfloat16": {"dtype": "bfloat16", "cache_dtype": "bfloat16"},
    "float16": {"dtype": "float16", "cache_dtype": "float16"},
    "narrow_cache": {"cache_dtype": "bfloat16"},
}  # fmt: skip

MIXED_STEPS = [
    [(0, 7), (0, 1), (0, 9), (0, 13)],
    [(7, 8), (1, 2), (9, 14), (13, 14)],
    [(8, 9), (2, 3), (14, 15), (14, 15)],
    [(9, 11), (3, 4), (15, 17), (15, 16)],
]


@pytest.mark.parametrize("attention_class", [ReferenceAttention, CpuAttention])
@pytest.mark.parametrize("name", VARIANTS)
def test_attention_mixed_steps_match_float64_loop(name, attention_class, torch_rng):
    """Prefill, split prefill and decode in one batch are right, whatever unused slots hold."""
    spec = replace(SPEC, **VARIANTS[name])
    check(spec, [11, 4, 17, 16], MIXED_STEPS, torch_rng, attention_class)


@pytest.mark.parametrize("name", ["plain", "window", "soft_cap"])
def test_attention_decode_of_unequal_lengths_is_split_and_right(name, torch_rng, monkeypatch):
    """One long context beside short ones is attended in batches of its own length."""
    monkeypatch.setattr("quire.backends.reference.attention_plan._SMALL_BATCH_TOKENS", 0)
    spec = replace(SPEC, **VARIANTS[name])
    steps = [[(0, 60), (0, 3), (0, 5)], [(60, 61), (3, 4), (5, 6)]]
    check(spec, [61, 4, 6], steps, torch_rng)


def test_attention_long_prompt_in_parts_matches(torch_rng, monkeypatch):
    """Scores that are written down are held in bounded parts, with the same result."""
    monkeypatch.setattr("quire.backends.reference.attention._MAX_SCORES", 300)
    check(replace(SPEC, soft_cap=1.0), [40], [[(0, 23)], [(23, 40)]], torch_rng)


def test_attention_renumbered_blocks_give_same_bits(torch_rng):
    """Where a block lies is nobody's business."""
    case = make_case(SPEC, [11, 17], torch_rng)
    attention = ReferenceAttention(SPEC)
    steps = [[(0, 10), (0, 16)], [(10, 11), (16, 17)]]
    renumbered = replace_tables(case, list(range(1, 9)))
    cache_a, cache_b = nan_cache(attention, case), nan_cache(attention, renumbered)
    for ranges in steps:
        for a, b in zip(
            run(attention, case, cache_a, ranges),
            run(attention, renumbered, cache_b, ranges),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.native
@pytest.mark.skipif(not kernels_cpu.HAVE_NATIVE, reason="the compiled kernels are not built")
@pytest.mark.parametrize("name", ["plain", "window", "soft_cap", "bfloat16"])
def test_native_attention_gives_same_bits_alone_split_and_in_a_batch(name, torch_rng):
    """What the CPU claims as invariant: neither company nor the cutting of a prompt shows."""
    spec = replace(SPEC, **VARIANTS[name])
    case = make_case(spec, [37, 20, 3], torch_rng)
    attention = CpuAttention(spec)
    whole = run(attention, case, nan_cache(attention, case), [(0, 37), (0, 20), (0, 3)])
    alone = run(attention, case, nan_cache(attention, case), [(0, 37)])
    cache = nan_cache(attention, case)
    parts = [run(attention, case, cache, [cut])[0] for cut in ((0, 5), (5, 6), (6, 29), (29, 37))]
    assert torch.equal(whole[0], alone[0])
    assert torch.equal(torch.cat(parts), alone[0])


def replace_tables(case: Case, ids: list[int]) -> Case:
    ids = list(ids)
    return replace(case, tables=[[ids.pop() for _ in table] for table in case.tables])


def test_attention_padding_rows_are_zero(torch_rng):
    """Rows that belong to no request are written, and their tokens go to the block of nobody."""
    case = make_case(SPEC, [5], torch_rng)
    attention = ReferenceAttention(SPEC)
    cache = nan_cache(attention, case)
    batch = make_batch(case, [(0, 5)])
    batch = replace(
        batch, slot_mapping=torch.cat((batch.slot_mapping, torch.zeros(3, dtype=torch.int64)))
    )
    q, k, v = (
        torch.cat((t[0], torch.full((3, *t[0].shape[1:]), 7.0))) for t in (case.q, case.k, case.v)
    )
    out = torch.full((8, 4, 8), float("nan"))
    attention.forward(q, k, v, cache, attention.plan(batch), out)
    torch.testing.assert_close(out[:5].double(), oracle(case, 0), rtol=1e-5, atol=1e-5)
    assert (out[5:] == 0).all()


def test_attention_takes_strided_views(torch_rng):
    """q, k and v may be views into one fused projection."""
    case = make_case(replace(SPEC, num_kv_heads=4), [6], torch_rng)
    fused = torch.stack([t[0] for t in (case.q, case.k, case.v)], dim=1)
    attention = ReferenceAttention(case.spec)
    out = torch.empty(6, 4, 8)
    plan = attention.plan(make_batch(case, [(0, 6)]))
    attention.forward(fused[:, 0], fused[:, 1], fused[:, 2], nan_cache(attention, case), plan, out)
    torch.testing.assert_close(out.double(), oracle(case, 0), rtol=1e-5, atol=1e-5)


def test_attention_writes_only_its_slots(torch_rng):
    """The cache of others is untouched."""
    case = make_case(SPEC, [6], torch_rng)
    attention = ReferenceAttention(SPEC)
    cache = nan_cache(attention, case)
    run(attention, case, cache, [(0, 6)])
    for name, new in (("k", case.k[0]), ("v", case.v[0])):
        slots = cache.tensors[name].flatten(0, 1)
        mine = make_batch(case, [(0, 6)]).slot_mapping
        assert torch.equal(slots[mine], new)
        others = torch.ones(len(slots), dtype=torch.bool).index_fill(0, mine, value=False)
        assert slots[others].isnan().all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention_any_split_matches_whole_prefill(data):
    """However a prompt is cut into steps, its last token attends to the same."""
    heads = data.draw(st.sampled_from([(1, 1), (2, 1), (6, 3)]))
    spec = replace(
        SPEC, num_heads=heads[0], num_kv_heads=heads[1],
        head_size=data.draw(st.sampled_from([4, 7])), block_size=data.draw(st.sampled_from([1, 2, 5])),
        **data.draw(st.sampled_from([{}, {"kind": "sliding_window", "window": 3}, {"kind": "chunked", "window": 4}])),
    )  # fmt: skip
    length = data.draw(st.integers(1, 14))
    cuts = sorted(data.draw(st.sets(st.integers(1, length), max_size=4)) | {length})
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    check(spec, [length], [[pair] for pair in zip([0, *cuts], cuts, strict=False)], rng)


def test_copy_blocks_then_export_gives_same_bits(torch_rng):
    """A copied block is the block, bit for bit; unused slots too."""
    attention = ReferenceAttention(replace(SPEC, v_head_size=3))
    cache = attention.allocate(6)
    for tensor in cache.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch_rng))
    before = attention.export_blocks(cache, [1, 2])
    attention.copy_blocks(cache, [1, 2], [4, 3])
    assert torch.equal(attention.export_blocks(cache, [4, 3]), before)
    assert before.shape == (2, 4, 2, 11)


def test_import_blocks_of_exported_blocks_restores_the_cache(torch_rng):
    """Two backends exchange pages through the canonical layout and lose nothing."""
    spec = replace(SPEC, cache_dtype="bfloat16", v_head_size=3)
    attention = ReferenceAttention(spec)
    source, target = attention.allocate(4), attention.allocate(4)
    for tensor in source.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=torch_rng))
    attention.import_blocks(target, [3, 1], attention.export_blocks(source, [1, 2]))
    for name in ("k", "v"):
        assert torch.equal(target.tensors[name][[3, 1]], source.tensors[name][[1, 2]])


def test_cache_layout_bytes_are_those_allocated():
    """The core sizes the cache by bytes_per_block."""
    attention = ReferenceAttention(replace(SPEC, v_head_size=3, cache_dtype="float16"))
    cache = attention.allocate(7)
    assert (
        sum(t.nbytes for t in cache.tensors.values())
        == 7 * attention.cache_layout().bytes_per_block
    )


def test_reasons_against_names_everything_at_once():
    """Whoever asks for too much learns all of it."""
    spec = replace(SPEC, kind="cross", num_heads=5, cache_dtype="int3")
    codes = {reason.code for reason in ReferenceAttention.reasons_against(spec)}
    assert codes == {"attention.kind", "attention.heads", "attention.dtype"}
    assert ReferenceAttention.reasons_against(SPEC) == []
