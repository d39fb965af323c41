"""Attention over a paged cache as Triton kernels: new tokens of any mix, and split decoding.

The rows of a tile are pairs (token, query head of one key head), token major, so that all heads
that share a key head read it once. Softmax is kept in base 2 with running maxima.
Source: Dao 2023 (FlashAttention-2, algorithm 1); split decoding: Dao et al. 2023 (Flash-Decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels_triton.functions import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _first_visible(position, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a query sees."""
    first = position * 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    if CHUNK > 0:
        first = position - position % CHUNK
    return first


@triton.jit
def _attend(
    q,
    row_positions,
    row_mask,
    slopes,
    maximum,
    total,
    acc,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table_ptr,
    kv_head,
    begin,
    end,
    first,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Online softmax of a tile's rows over positions [begin, end), of which those < first are gone.

    q [M, BLOCK_D]; row_positions, maximum, total [M]; acc [M, BLOCK_DV]. Returns the last three.
    """
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for start in range(begin, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        is_there = (positions < end) & (positions >= first)
        block = tl.load(table_ptr + positions // PAGE, mask=is_there, other=0).to(tl.int64)
        slot = positions % PAGE
        k_rows = k_ptr + block * k_block_stride + slot * k_slot_stride + kv_head * k_head_stride
        k_mask = is_there[:, None] & (d[None, :] < D)
        k = tl.load(k_rows[:, None] + d[None, :], mask=k_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        scale_index = (block * PAGE + slot) * NUM_KV_HEADS + kv_head
        if HAS_SCALES:
            k_scale = tl.load(k_scale_ptr + scale_index, mask=is_there, other=0.0)
            scores = scores * k_scale[None, :]
        if HAS_CAP:
            scores = soft_cap * tanh(scores / soft_cap)
        if HAS_ALIBI:
            distance = (row_positions[:, None] - positions[None, :]).to(tl.float32)
            scores = scores - slopes[:, None] * distance
        is_past = positions[None, :] <= row_positions[:, None]
        sees = is_there[None, :] & is_past & row_mask[:, None]
        if WINDOW > 0 or CHUNK > 0:
            begins = _first_visible(row_positions, WINDOW, CHUNK)
            sees = sees & (positions[None, :] >= begins[:, None])
        scores = tl.where(sees, scores * LOG2_E, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum: then 0 keeps the differences finite.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(maximum - pivot)
        total = total * rescale + tl.sum(weights, 1)
        v_rows = v_ptr + block * v_block_stride + slot * v_slot_stride + kv_head * v_head_stride
        v_mask = is_there[:, None] & (dv[None, :] < DV)
        v = tl.load(v_rows[:, None] + dv[None, :], mask=v_mask, other=0.0).to(q.dtype)
        if HAS_SCALES:
            v_scale = tl.load(v_scale_ptr + scale_index, mask=is_there, other=0.0)
            weights = weights * v_scale[None, :]
        acc = acc * rescale[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def _find_request(starts_ptr, block, num_requests, BLOCK_Q: tl.constexpr):
    """The request that a block of queries belongs to: request r begins at block start / Q + r."""
    low: tl.int32 = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        first_block = tl.load(starts_ptr + middle) // BLOCK_Q + middle
        if first_block <= block:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_requests"])
def prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    starts_ptr,
    lengths_ptr,
    table_ptr,
    sinks_ptr,
    slopes_ptr,
    num_requests,
    scale,
    soft_cap,
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    out_token_stride,
    out_head_stride,
    MIN_QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Attention of BLOCK_M // GROUP tokens of one request, for the heads of one key head.

    Requests with fewer than MIN_QUERIES new tokens are left to `decode_kernel`.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    block = tl.program_id(1)
    request = _find_request(starts_ptr, block, num_requests, BLOCK_Q)
    query_begin = tl.load(starts_ptr + request)
    num_queries = tl.load(starts_ptr + request + 1) - query_begin
    first_query = (block - (query_begin // BLOCK_Q + request)) * BLOCK_Q
    if (first_query >= num_queries) | (num_queries < MIN_QUERIES):
        return
    length = tl.load(lengths_ptr + request)
    context = length - num_queries
    m = tl.arange(0, BLOCK_M)
    query = first_query + m // GROUP
    head = kv_head * GROUP + m % GROUP
    row_mask = (m < BLOCK_Q * GROUP) & (query < num_queries)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_rows = q_ptr + (query_begin + query).to(tl.int64) * q_token_stride + head * q_head_stride
    q_mask = row_mask[:, None] & (d[None, :] < D)
    q = tl.load(q_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        maximum = tl.load(sinks_ptr + head, mask=row_mask, other=0.0) * LOG2_E
        total = total + 1.0
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + head, mask=row_mask, other=0.0)
    positions = context + query
    end = tl.minimum(context + first_query + BLOCK_Q, length)
    first = _first_visible(context + first_query, WINDOW, CHUNK)
    maximum, total, acc = _attend(
        q,
        positions,
        row_mask,
        slopes,
        maximum,
        total,
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        k_ptr,
        v_ptr,
        k_scale_ptr,
        v_scale_ptr,
        table_ptr + request.to(tl.int64) * table_stride,
        kv_head,
        first // BLOCK_N * BLOCK_N,
        end,
        first,
        k_block_stride,
        k_slot_stride,
        k_head_stride,
        v_block_stride,
        v_slot_stride,
        v_head_stride,
        scale,
        soft_cap,
        NUM_KV_HEADS,
        PAGE,
        D,
        DV,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
        WINDOW,
        CHUNK,
        HAS_CAP,
        HAS_ALIBI,
        HAS_SCALES,
    )
    out_rows = out_ptr + (query_begin + query).to(tl.int64) * out_token_stride
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(
        (out_rows + head * out_head_stride)[:, None] + dv[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & (dv[None, :] < DV),
    )


@triton.jit
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,
    partial_ptr,
    partial_log_ptr,
    starts_ptr,
    lengths_ptr,
    table_ptr,
    sinks_ptr,
    slopes_ptr,
    scale,
    soft_cap,
    q_token_stride,
    q_head_stride,
    k_block_stride,
    k_slot_stride,
    k_head_stride,
    v_block_stride,
    v_slot_stride,
    v_head_stride,
    table_stride,
    out_token_stride,
    out_head_stride,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """One part of the context of a request with one new token, for the heads of one key head.

    With one split the result goes to out; otherwise a normalised part and the base-2 logarithm of
    its weight go to partial float32 [R, Hq, SPLITS, DV] and partial_log float32 [R, Hq, SPLITS].
    """
    kv_head = tl.program_id(0)
    request = tl.program_id(1)
    split = tl.program_id(2)
    query_begin = tl.load(starts_ptr + request)
    if tl.load(starts_ptr + request + 1) - query_begin != 1:
        return
    length = tl.load(lengths_ptr + request)
    first = _first_visible(length - 1, WINDOW, CHUNK)
    base = first // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - base, SPLITS), BLOCK_N) * BLOCK_N
    begin = base + split * share
    end = tl.minimum(begin + share, length)
    m = tl.arange(0, BLOCK_M)
    row_mask = m < GROUP
    head = kv_head * GROUP + m
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_rows = q_ptr + query_begin.to(tl.int64) * q_token_stride + head * q_head_stride
    q_mask = row_mask[:, None] & (d[None, :] < D)
    q = tl.load(q_rows[:, None] + d[None, :], mask=q_mask, other=0.0)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:  # noqa: SIM102 - one is of the compiler, the other of the device
        if split == 0:
            maximum = tl.load(sinks_ptr + head, mask=row_mask, other=0.0) * LOG2_E
            total = total + 1.0
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + head, mask=row_mask, other=0.0)
    maximum, total, acc = _attend(
        q,
        tl.zeros([BLOCK_M], tl.int32) + (length - 1),
        row_mask,
        slopes,
        maximum,
        total,
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        k_ptr,
        v_ptr,
        k_scale_ptr,
        v_scale_ptr,
        table_ptr + request.to(tl.int64) * table_stride,
        kv_head,
        begin,
        end,
        first,
        k_block_stride,
        k_slot_stride,
        k_head_stride,
        v_block_stride,
        v_slot_stride,
        v_head_stride,
        scale,
        soft_cap,
        NUM_KV_HEADS,
        PAGE,
        D,
        DV,
        BLOCK_D,
        BLOCK_DV,
        BLOCK_N,
        WINDOW,
        CHUNK,
        HAS_CAP,
        HAS_ALIBI,
        HAS_SCALES,
    )
    is_value = row_mask[:, None] & (dv[None, :] < DV)
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    if SPLITS == 1:
        rows = out_ptr + query_begin.to(tl.int64) * out_token_stride + head * out_head_stride
        value = result.to(out_ptr.dtype.element_ty)
        tl.store(rows[:, None] + dv[None, :], value, mask=is_value)
    else:
        index = (request * (NUM_KV_HEADS * GROUP) + head) * SPLITS + split
        tl.store(partial_ptr + index[:, None] * DV + dv[None, :], result, mask=is_value)
        weight = tl.where(total == 0, float("-inf"), maximum + tl.log2(total))
        tl.store(partial_log_ptr + index, weight, mask=row_mask)


@triton.jit
def combine_kernel(
    partial_ptr,
    partial_log_ptr,
    out_ptr,
    starts_ptr,
    out_token_stride,
    out_head_stride,
    NUM_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Joins the parts of one head of one request by their weights."""
    head = tl.program_id(0)
    request = tl.program_id(1)
    query_begin = tl.load(starts_ptr + request)
    if tl.load(starts_ptr + request + 1) - query_begin != 1:
        return
    s = tl.arange(0, BLOCK_S)
    dv = tl.arange(0, BLOCK_DV)
    index = (request * NUM_HEADS + head) * SPLITS + s
    weights = tl.load(partial_log_ptr + index, mask=s < SPLITS, other=float("-inf"))
    is_used = weights > float("-inf")
    parts = tl.load(
        partial_ptr + index[:, None] * DV + dv[None, :],
        mask=is_used[:, None] & (dv[None, :] < DV),
        other=0.0,
    )
    shares = tl.exp2(weights - tl.max(weights, 0))
    result = tl.sum(parts * shares[:, None], 0) / tl.sum(shares, 0)
    row = out_ptr + query_begin.to(tl.int64) * out_token_stride + head * out_head_stride
    tl.store(row + dv, result.to(out_ptr.dtype.element_ty), mask=dv < DV)
