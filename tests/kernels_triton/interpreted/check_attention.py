"""Paged attention against a float64 loop: mixes, features, uneven heads, splits, 8-bit caches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from quire.kernels_triton.attention import (
    AttentionShape,
    PagedCache,
    PagedStep,
    choose_splits,
    make_partials,
    paged_attention,
)
from quire.kernels_triton.cache import copy_blocks, write_cache
from quire.kernels_triton.launch import TABLES, DeviceLauncher, read_table

BASE = AttentionShape(
    num_heads=4, num_kv_heads=2, head_size=64, v_head_size=64, block_size=16, scale=0.125
)
# (new tokens, context with them)
MIX = [(1, 37), (5, 5), (1, 1), (17, 40), (0, 9), (1, 130)]


def expected(shape, q, k, v, sinks, slopes):
    """Attention of the last len(q) tokens of one request, in float64."""
    num_new, length, group = len(q), len(k), shape.num_heads // shape.num_kv_heads
    out = torch.zeros(num_new, shape.num_heads, shape.v_head_size, dtype=torch.float64)
    for t in range(num_new):
        p = length - num_new + t
        first = max(0, p - shape.window + 1) if shape.window else 0
        first = p - p % shape.chunk if shape.chunk else first
        for h in range(shape.num_heads):
            s = (k[first : p + 1, h // group] @ q[t, h]) * shape.scale
            if shape.soft_cap:
                s = shape.soft_cap * torch.tanh(s / shape.soft_cap)
            if slopes is not None:
                s = s - slopes[h].double() * (p - torch.arange(first, p + 1))
            if sinks is not None:
                w = torch.cat([s, sinks[h : h + 1].double()]).softmax(0)[:-1]
            else:
                w = s.softmax(0)
            out[t, h] = w @ v[first : p + 1, h // group]
    return out


def run(launcher, shape, mix, *, dtype=torch.float32, splits=1, fp8=None, sinks=None, slopes=None):
    torch.manual_seed(0)
    total = sum(length for _, length in mix)
    counts = [math.ceil(length / shape.block_size) for _, length in mix]
    order = (torch.randperm(sum(counts) + 2)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    num_blocks, width = sum(counts) + 2, max(counts)
    place = (num_blocks, shape.block_size, shape.num_kv_heads)
    store = fp8 or dtype
    nan = torch.full((*place, max(shape.head_size, shape.v_head_size)), float("nan"))
    is_int8 = fp8 == torch.int8
    scales = [torch.full(place, float("nan")) if is_int8 else None for _ in range(2)]
    cache = PagedCache(
        k=nan[..., : shape.head_size].to(store).clone(memory_format=torch.contiguous_format),
        v=nan[..., : shape.v_head_size].to(store).clone(memory_format=torch.contiguous_format),
        k_scale=scales[0],
        v_scale=scales[1],
    )
    k = torch.randn(total, shape.num_kv_heads, shape.head_size).to(dtype)
    v = torch.randn(total, shape.num_kv_heads, shape.v_head_size).to(dtype)
    slots, rows, starts, at = [], [], [0], 0
    table = torch.full((len(mix), width + 1), num_blocks - 1, dtype=torch.int32)
    for r, (num_new, length) in enumerate(mix):
        table[r, : counts[r]] = torch.tensor(tables[r], dtype=torch.int32)
        slots += [tables[r][t // 16] * 16 + t % 16 for t in range(length)]
        rows.append((at, at + length))
        starts.append(starts[-1] + num_new)
        at += length
    write_cache(launcher, k, v, cache, torch.tensor(slots))
    q = torch.randn(starts[-1], shape.num_heads, shape.head_size).to(dtype)
    partial, partial_log = make_partials(
        shape, num_requests=len(mix), num_splits=splits, device=torch.device("cpu")
    )
    step = PagedStep(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([length for _, length in mix], dtype=torch.int32),
        block_table=table,
        num_tokens=starts[-1],
        has_decodes=True,
        has_prefills=True,
        num_splits=splits,
        partial=partial,
        partial_log=partial_log,
    )
    out = torch.full((len(q), shape.num_heads, shape.v_head_size), float("nan"), dtype=dtype)
    paged_attention(launcher, shape, step, q, cache, out, sinks=sinks, alibi_slopes=slopes)
    want = [
        expected(
            shape,
            q[starts[r] : starts[r + 1]].double(),
            k[a:b].double(),
            v[a:b].double(),
            sinks,
            slopes,
        )
        for r, (a, b) in enumerate(rows)
    ]
    return out.double(), torch.cat(want)


FEATURES = {
    "plain": {},
    "window": {"window": 20},
    "chunk": {"chunk": 24},
    "cap": {"soft_cap": 0.8},
    "uneven": {"head_size": 96, "v_head_size": 64},
    "d80": {"head_size": 80, "v_head_size": 80},
    "group7": {"num_heads": 7, "num_kv_heads": 1},
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", FEATURES)
def test_mixed_step_equals_loop(launcher, name, splits):
    """Prompts, chunks, single tokens and an absent request in one step, for every feature."""
    out, want = run(launcher, replace(BASE, **FEATURES[name]), MIX, splits=splits)
    assert torch.allclose(out, want, atol=2e-5)


@pytest.mark.parametrize("splits", [1, 4])
def test_sinks_and_alibi_equal_loop(launcher, splits):
    """A sink counts once however a context is split; ALiBi goes by distance."""
    sinks, slopes = torch.randn(4), torch.rand(4) * 0.4
    out, want = run(launcher, BASE, MIX, splits=splits, sinks=sinks, slopes=slopes)
    assert torch.allclose(out, want, atol=2e-5)


def test_bfloat16_rounds_like_bfloat16(launcher):
    """Accumulation stays in float32."""
    out, want = run(launcher, BASE, MIX, dtype=torch.bfloat16, splits=2)
    assert (out - want).abs().max() < 2e-2


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8])
def test_cache_in_8_bits_is_near(launcher, fp8):
    """An 8-bit cache costs a few parts in a hundred, and what is in no slot costs nothing."""
    out, want = run(launcher, BASE, MIX, fp8=fp8, splits=2)
    error = (out - want).abs().max()
    assert 1e-4 < error < 0.2


def test_copied_blocks_are_equal_bit_for_bit(launcher):
    """Odd sizes and NaN patterns travel unchanged; other blocks stay."""
    data = torch.randint(-(2**15), 2**15, (6, 16, 3, 5)).to(torch.int16).view(torch.bfloat16)
    before = data.clone().view(torch.int16)
    copy_blocks(launcher, data, torch.tensor([1, 4]), torch.tensor([0, 3]))
    after = data.view(torch.int16)
    assert torch.equal(after, before[[1, 1, 2, 4, 4, 5]])


def test_splits_follow_the_work_there_is():
    """Few requests of long context are cut, many or short ones are not."""
    launcher = DeviceLauncher(read_table(TABLES / "portable.json"))

    def splits(num_requests, length):
        return choose_splits(
            launcher, num_requests=num_requests, num_kv_heads=1, max_seq_len=length
        )

    assert splits(1, 8192) > 1
    assert splits(1, 200) == 1
    assert splits(200, 8192) == 1
