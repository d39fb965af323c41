"""Grouped products of experts whose weights are codes, as Triton kernels.

Pairs are sorted as in `experts_kernels`; weights come from memory in 4 or 8 bits.
Source: grouped products: Gale et al. 2022 (MegaBlocks), section 5.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire.kernels_triton.experts_kernels import activate, find_expert
from quire.kernels_triton.float8 import add_products
from quire.kernels_triton.functions import scale_part


@triton.jit
def _add_differences(x, code, zero, mask, part, wide: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Part + x @ (code - zero).T, for whole numbers [N, BLOCK_K]; exact in every dtype."""
    weight = tl.where(mask, code.to(tl.int32) - zero[:, None], 0)
    if IS_WHOLE:
        part += tl.dot(x, tl.trans(weight.to(tl.int8)), out_dtype=tl.int32)
    else:
        weight = tl.trans(weight.to(tl.float32).to(wide))
        part += tl.dot(x.to(tl.float32).to(wide), weight, input_precision="ieee")
    return part


@triton.jit
def _product(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    m,
    n,
    is_row,
    is_output,
    x_stride,
    codes_stride,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    X_GROUPS: tl.constexpr,
    FLOAT8: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows m of x times rows n of the weights of all experts, both int64: float32 [M, N].

    The forms are those of `quantized_linear_kernel` and `float8_linear_kernel`.
    """
    # Rounded inputs of 8 bits are whole numbers, which a half has all of.
    is_byte: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 8
    wide: tl.constexpr = tl.float16 if is_byte else x_ptr.dtype.element_ty
    x_rows = x_ptr + m * x_stride
    code_rows = codes_ptr + n * codes_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(GROUPS):
        zero = tl.full([BLOCK_N], 1 << (BITS - 1), tl.int32)
        if HAS_ZEROS:
            zero = tl.load(zeros_ptr + n * GROUPS + group, mask=is_output, other=0).to(tl.int32)
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if IS_WHOLE else tl.float32)
        for begin in range(0, SIZE, BLOCK_K):
            i = begin + tl.arange(0, BLOCK_K)
            k = group * SIZE + i
            is_input = (i < SIZE)[None, :]
            x = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None] & is_input, other=0)
            mask = is_output[:, None] & is_input
            if BITS == 4:
                code = tl.load(code_rows[:, None] + (k // 2)[None, :], mask=mask, other=0)
                code = (code.to(tl.int32) >> (k % 2 * 4)[None, :]) & 15
            else:
                code = tl.load(code_rows[:, None] + k[None, :], mask=mask, other=0)
            if FLOAT8:
                part = add_products(x, code, part, wide, UNITS, BLOCK_K)
            else:
                part = _add_differences(x, code, zero, mask, part, wide, IS_WHOLE)
        acc += scale_part(
            part.to(tl.float32),
            scales_ptr,
            x_scales_ptr,
            m,
            n,
            group,
            is_row,
            is_output,
            GROUPS,
            X_GROUPS,
        )
    return acc


@triton.jit(do_not_specialize=["num_experts"])
def expert_codes_up_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    order_ptr,
    starts_ptr,
    tiles_ptr,
    out_ptr,
    num_experts,
    inner,
    x_stride,
    codes_stride,
    alpha,
    limit,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    X_GROUPS: tl.constexpr,
    FLOAT8: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """act(x @ gate.T) * (x @ up.T) of one tile of sorted pairs: out [pairs, I], sorted.

    Gate and up are multiplied one after the other: inputs are read twice, and both fit registers.
    """
    tile = tl.program_id(0)
    expert = find_expert(tiles_ptr, tile, num_experts)
    if expert >= num_experts:
        return
    row = (tile - tl.load(tiles_ptr + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row += tl.load(starts_ptr + expert)
    is_row = row < tl.load(starts_ptr + expert + 1)
    m = (tl.load(order_ptr + row, mask=is_row, other=0) // K).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < inner
    n = expert.to(tl.int64) * 2 * inner + column
    gate = _product(
        x_ptr,
        x_scales_ptr,
        codes_ptr,
        scales_ptr,
        zeros_ptr,
        m,
        n,
        is_row,
        is_column,
        x_stride,
        codes_stride,
        BITS,
        GROUPS,
        SIZE,
        X_GROUPS,
        FLOAT8,
        UNITS,
        HAS_ZEROS,
        IS_WHOLE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    up = _product(
        x_ptr,
        x_scales_ptr,
        codes_ptr,
        scales_ptr,
        zeros_ptr,
        m,
        n + inner,
        is_row,
        is_column,
        x_stride,
        codes_stride,
        BITS,
        GROUPS,
        SIZE,
        X_GROUPS,
        FLOAT8,
        UNITS,
        HAS_ZEROS,
        IS_WHOLE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        gate += tl.load(bias_ptr + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptr + n + inner, mask=is_column, other=0.0).to(tl.float32)[None, :]
    result = activate(gate, up, alpha, limit, KIND)
    place = out_ptr + (row.to(tl.int64) * inner)[:, None] + column[None, :]
    mask = is_row[:, None] & is_column[None, :]
    tl.store(place, result.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_experts"])
def expert_codes_down_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    shares_ptr,
    order_ptr,
    starts_ptr,
    tiles_ptr,
    out_ptr,
    num_experts,
    hidden,
    x_stride,
    codes_stride,
    WEIGHS_INPUT: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    X_GROUPS: tl.constexpr,
    FLOAT8: tl.constexpr,
    UNITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ down.T of one tile of sorted pairs, times their share: out float32 [pairs, H]."""
    tile = tl.program_id(0)
    expert = find_expert(tiles_ptr, tile, num_experts)
    if expert >= num_experts:
        return
    row = (tile - tl.load(tiles_ptr + expert)) * BLOCK_M + tl.arange(0, BLOCK_M)
    row += tl.load(starts_ptr + expert)
    is_row = row < tl.load(starts_ptr + expert + 1)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = column < hidden
    n = expert.to(tl.int64) * hidden + column
    acc = _product(
        x_ptr,
        x_scales_ptr,
        codes_ptr,
        scales_ptr,
        zeros_ptr,
        row.to(tl.int64),
        n,
        is_row,
        is_column,
        x_stride,
        codes_stride,
        BITS,
        GROUPS,
        SIZE,
        X_GROUPS,
        FLOAT8,
        UNITS,
        HAS_ZEROS,
        IS_WHOLE,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=is_column, other=0.0).to(tl.float32)[None, :]
    pair = tl.load(order_ptr + row, mask=is_row, other=0)
    if not WEIGHS_INPUT:
        acc = acc * tl.load(shares_ptr + pair, mask=is_row, other=0.0)[:, None]
    place = out_ptr + (pair.to(tl.int64) * hidden)[:, None] + column[None, :]
    tl.store(place, acc, mask=is_row[:, None] & is_column[None, :])
