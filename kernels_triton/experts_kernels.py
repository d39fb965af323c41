"""Mixtures of experts as Triton kernels: routing, sorting by expert, grouped products, the sum.

A pair is (token, one of its k experts), numbered token * k + i. Pairs are sorted by expert without
atomics, so a sum never depends on the order in which programs run.
Source: Shazeer et al. 2017, eq. 1; grouped products: Gale et al. 2022 (MegaBlocks), section 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels_triton.functions import tanh

NO_EXPERT = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _best(values, is_open, ids):
    """The largest open value of each row and the lowest id that has it: [R], [R]."""
    best = tl.max(tl.where(is_open, values, float("-inf")), 1)
    chosen = tl.min(tl.where(is_open & (values == best[:, None]), ids, NO_EXPERT), 1)
    return best, chosen


@triton.jit
def _kept_groups(
    choosing,
    is_open,
    ids,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Which experts are in one of the KEPT groups with the largest scores: [ROWS, BLOCK_E]."""
    g = tl.arange(0, BLOCK_G)[None, :]
    scores = tl.full([ROWS, BLOCK_G], float("-inf"), tl.float32)
    for group in range(GROUPS):
        is_member = is_open & (ids // GROUP_SIZE == group)
        best, chosen = _best(choosing, is_member, ids)
        if TOP2:
            second, _ = _best(choosing, is_member & (ids != chosen[:, None]), ids)
            best += second
        scores = tl.where(g == group, best[:, None], scores)
    is_left = (g < GROUPS) & (scores >= float("-inf"))
    is_kept = is_open & (ids < 0)
    for _ in range(KEPT):
        _, best_group = _best(scores, is_left, g)
        is_left = is_left & (g != best_group[:, None])
        is_kept = is_kept | (ids // GROUP_SIZE == best_group[:, None])
    return is_kept


@triton.jit
def route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    num_tokens,
    logits_stride,
    scale,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    KEPT: tl.constexpr,
    TOP2: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """ROWS tokens: what `Ops.route_experts` describes."""
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    ids = tl.arange(0, BLOCK_E)[None, :]
    is_token = (token < num_tokens)[:, None]
    is_expert = is_token & (ids < E)
    place = logits_ptr + (token * logits_stride)[:, None] + ids
    logits = tl.load(place, mask=is_expert, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        most = tl.max(logits, 1)
        shares = tl.exp(logits - tl.where(most == float("-inf"), 0.0, most)[:, None])
        total = tl.sum(shares, 1)
        scores = shares / tl.where(total == 0, 1.0, total)[:, None]
    choosing = scores
    if HAS_BIAS:
        choosing = scores + tl.load(bias_ptr + ids, mask=ids < E, other=0.0)
    is_open = is_expert
    if KEPT < GROUPS:
        is_open = is_open & _kept_groups(
            choosing, is_open, ids, GROUPS, E // GROUPS, BLOCK_G, KEPT, TOP2, ROWS
        )
    k = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros([ROWS, BLOCK_K], tl.float32)
    chosen = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for number in range(K):
        _, expert = _best(choosing, is_open, ids)
        # Logits without a number (NaN) choose nobody: the last expert then, inside of all tables.
        expert = tl.minimum(expert, E - 1)[:, None]
        weight = tl.sum(tl.where(ids == expert, scores, 0.0), 1)
        is_open = is_open & (ids != expert)
        weights = tl.where(k == number, weight[:, None], weights)
        chosen = tl.where(k == number, expert, chosen)
    if RENORMALISED:
        weights = weights / (tl.sum(weights, 1) + 1e-20)[:, None]
    out = (token * K)[:, None] + k
    tl.store(weights_ptr + out, weights * scale, mask=is_token & (k < K))
    tl.store(ids_ptr + out, chosen.to(tl.int64), mask=is_token & (k < K))


@triton.jit
def sort_pairs_kernel(ids_ptr, order_ptr, starts_ptr, num_pairs, num_experts, BLOCK: tl.constexpr):
    """One expert: where its pairs begin among the sorted ones, and their numbers, ascending."""
    expert = tl.program_id(0)
    before = tl.full([], 0, tl.int32)
    for begin in range(0, num_pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=num_experts)
        before += tl.sum((ids < expert).to(tl.int32), 0)
    tl.store(starts_ptr + expert, before)
    for begin in range(0, num_pairs, BLOCK):
        pair = begin + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=num_experts)
        is_mine = ids == expert
        rank = tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + before + rank, pair, mask=is_mine)
        before += tl.sum(is_mine.to(tl.int32), 0)
    if expert == num_experts - 1:
        tl.store(starts_ptr + num_experts, before)


@triton.jit
def expert_tiles_kernel(
    starts_ptr, tiles_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Where each expert's tiles of BLOCK_M pairs begin: int32 [E + 1]."""
    expert = tl.arange(0, BLOCK_E)
    mask = expert < E
    begin = tl.load(starts_ptr + expert, mask=mask, other=0)
    count = tl.load(starts_ptr + expert + 1, mask=mask, other=0) - begin
    ends = tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)
    tl.store(tiles_ptr + expert + 1, ends, mask=mask)
    tl.store(tiles_ptr, 0)


@triton.jit
def _find_expert(tiles_ptr, tile, num_experts):
    """The last expert whose tiles begin at or before `tile`; num_experts: there is no such tile."""
    low: tl.int32 = 0
    high = num_experts + 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(tiles_ptr + middle) <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _activate(gate, up, alpha, limit, KIND: tl.constexpr):
    """KIND 0: SiLU, 1: GELU, 2: its tanh form, 3: clamped SwiGLU; of float32."""
    if KIND == 0:
        return gate / (1.0 + tl.exp(-gate)) * up
    if KIND == 1:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    if KIND == 2:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1.0 + tanh(inner)) * up
    gate = tl.minimum(gate, limit)
    up = tl.clamp(up, -limit, limit)
    return gate / (1.0 + tl.exp(-alpha * gate)) * (up + 1.0)


@triton.jit(do_not_specialize=["num_experts"])
def experts_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shares_ptr,
    order_ptr,
    starts_ptr,
    tiles_ptr,
    out_ptr,
    num_experts,
    hidden,
    inner,
    x_stride,
    alpha,
    limit,
    K: tl.constexpr,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHS_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """act(x @ gate.T) * (x @ up.T) of one tile of sorted pairs: out [pairs, I], sorted."""
    tile = tl.program_id(0)
    expert = _find_expert(tiles_ptr, tile, num_experts)
    if expert >= num_experts:
        return
    row = (tile - tl.load(tiles_ptr + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row += tl.load(starts_ptr + expert)
    is_row = row < tl.load(starts_ptr + expert + 1)
    pair = tl.load(order_ptr + row, mask=is_row, other=0)
    x_rows = x_ptr + (pair // K).to(tl.int64) * x_stride
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < inner
    base = expert.to(tl.int64) * 2 * inner
    gate_rows = weight_ptr + (base + n) * hidden
    share = tl.load(shares_ptr + pair, mask=is_row, other=0.0)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, hidden, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        is_input = (k < hidden)[None, :]
        x = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None] & is_input, other=0.0)
        if WEIGHS_INPUT:
            x = (x.to(tl.float32) * share[:, None]).to(x_ptr.dtype.element_ty)
        place = gate_rows[:, None] + k[None, :]
        mask = is_column[:, None] & is_input
        w = tl.load(place, mask=mask, other=0.0)
        gate += tl.dot(x, tl.trans(w), input_precision="ieee")
        w = tl.load(place + inner.to(tl.int64) * hidden, mask=mask, other=0.0)
        up += tl.dot(x, tl.trans(w), input_precision="ieee")
    if HAS_BIAS:
        bias = bias_ptr + base + n
        gate += tl.load(bias, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + inner, mask=is_column, other=0.0).to(tl.float32)[None, :]
    result = _activate(gate, up, alpha, limit, KIND)
    place = out_ptr + (row.to(tl.int64) * inner)[:, None] + n[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_experts"])
def experts_down_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    shares_ptr,
    order_ptr,
    starts_ptr,
    tiles_ptr,
    out_ptr,
    num_experts,
    hidden,
    inner,
    HAS_BIAS: tl.constexpr,
    WEIGHS_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ down.T of one tile of sorted pairs, times their share: out float32 [pairs, H]."""
    tile = tl.program_id(0)
    expert = _find_expert(tiles_ptr, tile, num_experts)
    if expert >= num_experts:
        return
    row = (tile - tl.load(tiles_ptr + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row += tl.load(starts_ptr + expert)
    is_row = row < tl.load(starts_ptr + expert + 1)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = n < hidden
    base = expert.to(tl.int64) * hidden + n
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(0, inner, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        is_input = (k < inner)[None, :]
        x_place = x_ptr + (row.to(tl.int64) * inner)[:, None] + k[None, :]
        x = tl.load(x_place, mask=is_row[:, None] & is_input, other=0.0)
        w_place = weight_ptr + (base * inner)[:, None] + k[None, :]
        w = tl.load(w_place, mask=is_column[:, None] & is_input, other=0.0)
        acc += tl.dot(x, tl.trans(w), input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + base, mask=is_column, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(order_ptr + row, mask=is_row, other=0)
    if not WEIGHS_INPUT:
        # As a layer of its own would, the expert's output is rounded before it is weighed.
        acc = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
        acc = acc * tl.load(shares_ptr + pair, mask=is_row, other=0.0)[:, None]
    place = out_ptr + (pair.to(tl.int64) * hidden)[:, None] + n[None, :]
    tl.store(place, acc, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def experts_sum_kernel(pairs_ptr, out_ptr, hidden, K: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of a token's K pairs, in the order of its experts."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden
    total = tl.zeros([BLOCK], tl.float32)
    for number in range(K):
        total += tl.load(pairs_ptr + (token * K + number) * hidden + column, mask=mask, other=0.0)
    tl.store(out_ptr + token * hidden + column, total.to(out_ptr.dtype.element_ty), mask=mask)


find_expert, activate = _find_expert, _activate
"""For kernels of other modules whose pairs are sorted likewise."""
