"""Attention over a latent cache: one key head for all query heads, its first features the values.

A tile's rows are (token, query head) pairs of one request, token major. Each part of the latent is
loaded once and serves the scores and the sum of values of all rows of the tile.
Source: DeepSeek-V2 report, section 2.1 and appendix C (absorbed projections); split decoding: Dao
et al. 2023 (Flash-Decoding).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.attention import AttentionShape, PagedCache, PagedStep
from quire.kernels_triton.attention_kernels import LOG2_E, combine_kernel
from quire.kernels_triton.launch import LaunchEntry, Launcher, ceil_div, power_of_two

_MIN_TILE = 16


@triton.jit
def _attend_latent(
    q_rows,
    row_positions,
    row_mask,
    k_ptr,
    scale_ptr,
    table_ptr,
    begin,
    end,
    block_stride,
    slot_stride,
    scale,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """Online softmax of rows `q_rows` (pointers [M]) over positions [begin, end).

    SLICE: features of queries and keys that are multiplied at a time; 0: all.
    Returns maximum [M], total [M] and acc [M, BLOCK_DV].
    """
    dv = tl.arange(0, BLOCK_DV)
    r = tl.arange(0, BLOCK_R)
    is_latent, is_rotated = (dv < DV)[None, :], (r < D - DV)[None, :]
    if SLICE == 0:
        q = tl.load(q_rows[:, None] + dv[None, :], mask=row_mask[:, None] & is_latent, other=0.0)
    q_rotated = tl.load(
        q_rows[:, None] + DV + r[None, :], mask=row_mask[:, None] & is_rotated, other=0.0
    )
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(begin, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        is_there = positions < end
        block = tl.load(table_ptr + positions // PAGE, mask=is_there, other=0).to(tl.int64)
        slot = positions % PAGE
        rows = (k_ptr + block * block_stride + slot * slot_stride)[:, None]
        rotated = tl.load(rows + DV + r[None, :], mask=is_there[:, None] & is_rotated, other=0.0)
        rotated = tl.trans(rotated.to(q_rotated.dtype))
        scores = tl.dot(q_rotated, rotated, input_precision="ieee")
        latent = tl.load(rows + dv[None, :], mask=is_there[:, None] & is_latent, other=0.0)
        latent = latent.to(q_rotated.dtype)
        if SLICE == 0:
            scores += tl.dot(q, tl.trans(latent), input_precision="ieee")
        else:
            # Read again, piece by piece, where registers do not hold a whole query and key.
            for first in range(0, BLOCK_DV, SLICE):
                i = first + tl.arange(0, SLICE)
                is_in = (i < DV)[None, :]
                q_part = tl.load(
                    q_rows[:, None] + i[None, :], mask=row_mask[:, None] & is_in, other=0.0
                )
                part = tl.load(rows + i[None, :], mask=is_there[:, None] & is_in, other=0.0)
                part = tl.trans(part.to(q_part.dtype))
                scores += tl.dot(q_part, part, input_precision="ieee")
        scores = scores * scale
        token_scale = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_SCALES:
            token_scale = tl.load(scale_ptr + block * PAGE + slot, mask=is_there, other=0.0)
            scores = scores * token_scale[None, :]
        sees = is_there[None, :] & (positions[None, :] <= row_positions[:, None])
        scores = tl.where(sees & row_mask[:, None], scores * LOG2_E, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum: then 0 keeps the differences finite.
        pivot = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(maximum - pivot)
        total = total * rescale + tl.sum(weights, 1)
        if HAS_SCALES:
            weights = weights * token_scale[None, :]
        acc = acc * rescale[:, None] + tl.dot(
            weights.to(latent.dtype), latent, input_precision="ieee"
        )
        maximum = new_maximum
    return maximum, total, acc


@triton.jit
def _find_request(starts_ptr, tile, num_requests, NUM_HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The request of a tile of rows: request r begins at tile start * heads // BLOCK_M + r."""
    low: tl.int32 = 0
    high = num_requests
    while low < high:
        middle = (low + high) // 2
        first = tl.load(starts_ptr + middle) * NUM_HEADS // BLOCK_M + middle
        if first <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_requests"])
def latent_prefill_kernel(
    q_ptr,
    k_ptr,
    scale_ptr,
    out_ptr,
    starts_ptr,
    lengths_ptr,
    table_ptr,
    num_requests,
    scale,
    q_token_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """BLOCK_M (token, head) rows of one request with several new tokens."""
    tile = tl.program_id(0)
    request = _find_request(starts_ptr, tile, num_requests, NUM_HEADS, BLOCK_M)
    query_begin = tl.load(starts_ptr + request)
    num_queries = tl.load(starts_ptr + request + 1) - query_begin
    first_row = (tile - (query_begin * NUM_HEADS // BLOCK_M + request)) * BLOCK_M
    if (num_queries < 2) | (first_row >= num_queries * NUM_HEADS):
        return
    row = first_row + tl.arange(0, BLOCK_M)
    query, head = row // NUM_HEADS, row % NUM_HEADS
    row_mask = query < num_queries
    context = tl.load(lengths_ptr + request) - num_queries
    token = (query_begin + query).to(tl.int64)
    last_query = tl.minimum((first_row + BLOCK_M - 1) // NUM_HEADS, num_queries - 1)
    _, total, acc = _attend_latent(
        q_ptr + token * q_token_stride + head * q_head_stride,
        context + query,
        row_mask,
        k_ptr,
        scale_ptr,
        table_ptr + request.to(tl.int64) * table_stride,
        0,
        context + last_query + 1,
        block_stride,
        slot_stride,
        scale,
        PAGE,
        D,
        DV,
        BLOCK_M,
        BLOCK_DV,
        BLOCK_R,
        BLOCK_N,
        SLICE,
        HAS_SCALES,
    )
    dv = tl.arange(0, BLOCK_DV)
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    place = out_ptr + ((token * NUM_HEADS + head) * DV)[:, None] + dv[None, :]
    mask = row_mask[:, None] & (dv < DV)[None, :]
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def latent_decode_kernel(
    q_ptr,
    k_ptr,
    scale_ptr,
    out_ptr,
    partial_ptr,
    partial_log_ptr,
    starts_ptr,
    lengths_ptr,
    table_ptr,
    scale,
    q_token_stride,
    q_head_stride,
    block_stride,
    slot_stride,
    table_stride,
    SPLITS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    """BLOCK_M heads of one new token over one part of its context; see `decode_kernel`."""
    request, split = tl.program_id(1), tl.program_id(2)
    query_begin = tl.load(starts_ptr + request)
    if tl.load(starts_ptr + request + 1) - query_begin != 1:
        return
    head = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = head < NUM_HEADS
    length = tl.load(lengths_ptr + request)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N
    begin = split * share
    token = query_begin.to(tl.int64)
    maximum, total, acc = _attend_latent(
        q_ptr + token * q_token_stride + head * q_head_stride,
        tl.zeros([BLOCK_M], tl.int32) + (length - 1),
        row_mask,
        k_ptr,
        scale_ptr,
        table_ptr + request.to(tl.int64) * table_stride,
        begin,
        tl.minimum(begin + share, length),
        block_stride,
        slot_stride,
        scale,
        PAGE,
        D,
        DV,
        BLOCK_M,
        BLOCK_DV,
        BLOCK_R,
        BLOCK_N,
        SLICE,
        HAS_SCALES,
    )
    dv = tl.arange(0, BLOCK_DV)
    mask = row_mask[:, None] & (dv < DV)[None, :]
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    if SPLITS == 1:
        place = out_ptr + ((token * NUM_HEADS + head) * DV)[:, None] + dv[None, :]
        tl.store(place, result.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        index = (request * NUM_HEADS + head) * SPLITS + split
        tl.store(partial_ptr + index[:, None] * DV + dv[None, :], result, mask=mask)
        weight = tl.where(total == 0, float("-inf"), maximum + tl.log2(total))
        tl.store(partial_log_ptr + index, weight, mask=row_mask)


def latent_tiles(launcher: Launcher, shape: AttentionShape) -> int:
    """Programs that share a decoded context: tiles of query heads."""
    return ceil_div(shape.num_heads, _decode_rows(launcher, shape))


def _decode_rows(launcher: Launcher, shape: AttentionShape) -> int:
    entry = _entry(launcher, "latent_decode", shape, 2)
    return max(_MIN_TILE, min(entry.constants["BLOCK_M"], power_of_two(shape.num_heads)))


def _entry(launcher: Launcher, kernel: str, shape: AttentionShape, item_size: int) -> LaunchEntry:
    return launcher.find(kernel, head_size=shape.v_head_size, item_size=item_size)


def latent_attention(
    launcher: Launcher,
    shape: AttentionShape,
    step: PagedStep,
    q: Tensor,
    cache: PagedCache,
    out: Tensor,
) -> None:
    """Attends; the step's latents are in the cache already.

    q [T, Hq, D] with a dense last dimension, out [T, Hq, Dv] contiguous; cache.k [N, B, 1, D].
    Mutates out alone.
    """
    if step.has_decodes:
        _decode(launcher, shape, step, q, cache, out)
    if step.has_prefills:
        _prefill(launcher, shape, step, q, cache, out)


def _constants(shape: AttentionShape, entry: LaunchEntry, cache: PagedCache) -> dict[str, int]:
    return {
        "NUM_HEADS": shape.num_heads,
        "PAGE": shape.block_size,
        "D": shape.head_size,
        "DV": shape.v_head_size,
        "BLOCK_DV": max(_MIN_TILE, power_of_two(shape.v_head_size)),
        "BLOCK_R": max(_MIN_TILE, power_of_two(shape.head_size - shape.v_head_size)),
        "BLOCK_N": entry.constants["BLOCK_N"],
        "SLICE": entry.constants.get("SLICE", 0),
        "HAS_SCALES": cache.k_scale is not None,
    }


def _tensors(q: Tensor, cache: PagedCache) -> list[Tensor]:
    return [q, cache.k, cache.k if cache.k_scale is None else cache.k_scale]


def _prefill(
    launcher: Launcher,
    shape: AttentionShape,
    step: PagedStep,
    q: Tensor,
    cache: PagedCache,
    out: Tensor,
) -> None:
    entry = _entry(launcher, "latent_prefill", shape, q.element_size())
    tile = max(_MIN_TILE, entry.constants["BLOCK_M"])
    num_tiles = step.num_tokens * shape.num_heads // tile + step.num_requests
    requests = (step.query_start_loc, step.seq_lens, step.block_table, step.num_requests)
    strides = (*q.stride()[:2], *cache.k.stride()[:2], step.block_table.stride(0))
    launcher.start(
        latent_prefill_kernel,
        (num_tiles,),
        [*_tensors(q, cache), out, *requests, shape.scale, *strides],
        {**_constants(shape, entry, cache), "BLOCK_M": tile},
        entry,
    )


def _decode(
    launcher: Launcher,
    shape: AttentionShape,
    step: PagedStep,
    q: Tensor,
    cache: PagedCache,
    out: Tensor,
) -> None:
    entry = _entry(launcher, "latent_decode", shape, q.element_size())
    rows = _decode_rows(launcher, shape)
    # With one part nothing is written there, but the kernel wants a pointer.
    partial = out if step.partial is None else step.partial
    partial_log = out if step.partial_log is None else step.partial_log
    requests = (step.query_start_loc, step.seq_lens, step.block_table)
    strides = (*q.stride()[:2], *cache.k.stride()[:2], step.block_table.stride(0))
    launcher.start(
        latent_decode_kernel,
        (ceil_div(shape.num_heads, rows), step.num_requests, step.num_splits),
        [*_tensors(q, cache), out, partial, partial_log, *requests, shape.scale, *strides],
        {**_constants(shape, entry, cache), "SPLITS": step.num_splits, "BLOCK_M": rows},
        entry,
    )
    if step.num_splits > 1:
        constants = {
            "NUM_HEADS": shape.num_heads,
            "SPLITS": step.num_splits,
            "BLOCK_S": power_of_two(step.num_splits),
            "DV": shape.v_head_size,
            "BLOCK_DV": power_of_two(shape.v_head_size),
        }
        arguments = [partial, partial_log, out, step.query_start_loc, *out.stride()[:2]]
        grid = (shape.num_heads, step.num_requests)
        launcher.start(combine_kernel, grid, arguments, constants, launcher.find("combine"))
