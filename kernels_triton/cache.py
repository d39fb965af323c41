"""Writing a step's keys and values into the cache, and copying whole blocks of it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.attention import PagedCache
from quire.kernels_triton.functions import round_to_even
from quire.kernels_triton.launch import Launcher, ceil_div, power_of_two

_LARGEST = {
    "float8_e4m3fn": 448.0,
    "float8_e4m3fnuz": 240.0,
    "float8_e5m2": 57344.0,
    "int8": 127.0,
}
"""The largest number of each 8-bit dtype; casts beyond it are infinite or undefined."""


@triton.jit
def _put(
    source,
    target,
    scale_ptr,
    is_row,
    slot,
    head,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (d[None, :] < D)
    value = tl.load(source[:, None] + d[None, :], mask=mask, other=0.0)
    if LARGEST > 0:
        value = value.to(tl.float32)
        if HAS_SCALES:
            scale = tl.div_rn(tl.max(tl.abs(value), 1), LARGEST)
            tl.store(scale_ptr + slot * NUM_KV_HEADS + head, scale, mask=is_row)
            value = round_to_even(tl.div_rn(value, tl.where(scale > 0, scale, 1.0)[:, None]))
        value = tl.clamp(value, -LARGEST, LARGEST)
    tl.store(target[:, None] + d[None, :], value.to(target.dtype.element_ty), mask=mask)


@triton.jit
def write_cache_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slots_ptr,
    num_tokens,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LARGEST: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_V: tl.constexpr,
):
    """BLOCK_T tokens, all their heads; a row of the tile is (token, head). Negative slots: none."""
    row = tl.arange(0, BLOCK_T * BLOCK_H)
    token = (tl.program_id(0) * BLOCK_T + row // BLOCK_H).to(tl.int64)
    head = row % BLOCK_H
    is_row = (token < num_tokens) & (head < NUM_KV_HEADS)
    slot = tl.load(slots_ptr + token, mask=is_row, other=-1).to(tl.int64)
    is_row = is_row & (slot >= 0)
    _put(
        k_ptr + token * k_token_stride + head * k_head_stride,
        k_cache_ptr + (slot * NUM_KV_HEADS + head) * D,
        k_scale_ptr,
        is_row,
        slot,
        head,
        D,
        BLOCK_D,
        NUM_KV_HEADS,
        LARGEST,
        HAS_SCALES,
    )
    if HAS_V:
        _put(
            v_ptr + token * v_token_stride + head * v_head_stride,
            v_cache_ptr + (slot * NUM_KV_HEADS + head) * DV,
            v_scale_ptr,
            is_row,
            slot,
            head,
            DV,
            BLOCK_DV,
            NUM_KV_HEADS,
            LARGEST,
            HAS_SCALES,
        )


def write_cache(
    launcher: Launcher, k: Tensor, v: Tensor, cache: PagedCache, slot_mapping: Tensor
) -> None:
    """Writes k [T, Hk, D] and v [T, Hk, Dv] (dense last dimension) to slots int64 [>= T].

    8-bit floats saturate. Where the cache has scales (int8), each (token, head) is divided by its
    own, its largest magnitude over 127. A latent cache (`v` is `k`) gets k alone. Mutates the
    cache's slots alone; the cache is contiguous.
    """
    num_tokens, num_heads, size = k.shape
    v_size = v.shape[-1]
    entry = launcher.find("write_cache")
    block_h = power_of_two(num_heads)
    block_t = max(1, entry.constants["ROWS"] // block_h)
    name = str(cache.k.dtype).removeprefix("torch.")
    launcher.start(
        write_cache_kernel,
        (ceil_div(num_tokens, block_t),),
        [
            *(k, v, cache.k, cache.v),
            *(cache.k if cache.k_scale is None else cache.k_scale,),
            *(cache.v if cache.v_scale is None else cache.v_scale,),
            *(slot_mapping, num_tokens, *k.stride()[:2], *v.stride()[:2]),
        ],
        {
            "NUM_KV_HEADS": num_heads,
            "BLOCK_H": block_h,
            "D": size,
            "DV": v_size,
            "BLOCK_D": power_of_two(size),
            "BLOCK_DV": power_of_two(v_size),
            "BLOCK_T": block_t,
            "LARGEST": _LARGEST.get(name, 0.0),
            "HAS_SCALES": cache.k_scale is not None,
            "HAS_V": cache.v is not cache.k,
        },
        entry,
    )


@triton.jit
def copy_blocks_kernel(
    data_ptr, source_ptr, target_ptr, block_stride, num_elements, BLOCK: tl.constexpr
):
    """One piece of one block."""
    pair = tl.program_id(0)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(source_ptr + pair).to(tl.int64) * block_stride
    target = tl.load(target_ptr + pair).to(tl.int64) * block_stride
    mask = offset < num_elements
    value = tl.load(data_ptr + source + offset, mask=mask)
    tl.store(data_ptr + target + offset, value, mask=mask)


def copy_blocks(launcher: Launcher, data: Tensor, source: Tensor, target: Tensor) -> None:
    """Copies blocks of `data` [N, ...] (contiguous), bit for bit; source, target int64 [n].

    No block is both source and target. Mutates the targets.
    """
    import torch

    words = data.view(len(data), -1)
    words = words.view(torch.uint8)
    if words.shape[1] % 4 == 0:
        words = words.view(torch.int32)
    entry = launcher.find("copy_blocks")
    block = entry.constants["BLOCK"]
    launcher.start(
        copy_blocks_kernel,
        (len(source), ceil_div(words.shape[1], block)),
        [words, source, target, words.stride(0), words.shape[1]],
        {"BLOCK": block},
        entry,
    )
