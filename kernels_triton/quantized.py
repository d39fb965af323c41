"""Linear layers whose weights have 4 or 8 bits: they are widened in registers, a tile at a time.

Source: Dettmers et al. 2022, section 2; Frantar et al. 2022 for groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.functions import round_to_even, scale_part, store_tile
from quire.kernels_triton.launch import Launcher, ceil_div, power_of_two

_MIN_TILE = 16
_MIN_INPUTS = 32
"""Inputs that a matrix unit takes at a time in 8 bits."""


@triton.jit
def round_rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    x_stride,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS groups of SIZE inputs: int8 codes and the scale, largest magnitude over 127."""
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    is_group = group < num_rows * GROUPS
    mask = is_group[:, None] & (i < SIZE)[None, :]
    row = (group // GROUPS).to(tl.int64) * x_stride + group % GROUPS * SIZE
    x = tl.load(x_ptr + row[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)
    codes = round_to_even(tl.div_rn(x, tl.where(scale == 0, 1.0, scale)[:, None]))
    codes = tl.clamp(codes, -127.0, 127.0)
    place = codes_ptr + (group.to(tl.int64) * SIZE)[:, None] + i[None, :]
    tl.store(place, codes.to(tl.int8), mask=mask)
    tl.store(scales_ptr + group, scale, mask=is_group)


@triton.jit
def quantized_linear_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    x_stride,
    codes_stride,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    X_GROUPS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of x @ ((codes - zeros) * scales).T + bias, group by group of SIZE inputs.

    X_GROUPS is 0 for x as it is, else x is int8 with so many scales a row. IS_WHOLE: differences
    fit into int8, and products are summed as whole numbers.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_output = m < num_rows, n < num_outputs
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    code_rows = codes_ptr + n.to(tl.int64) * codes_stride
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
                both = tl.load(code_rows[:, None] + (k // 2)[None, :], mask=mask, other=0)
                code = (both.to(tl.int32) >> (k % 2 * 4)[None, :]) & 15
            else:
                code = tl.load(code_rows[:, None] + k[None, :], mask=mask, other=0).to(tl.int32)
            weight = tl.where(mask, code - zero[:, None], 0)
            if IS_WHOLE:
                part += tl.dot(x, tl.trans(weight.to(tl.int8)), out_dtype=tl.int32)
            else:
                # Differences of bytes are exact in every one of the dtypes.
                wide = out_ptr.dtype.element_ty
                weight = tl.trans(weight.to(tl.float32).to(wide))
                part += tl.dot(x.to(tl.float32).to(wide), weight, input_precision="ieee")
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
    store_tile(acc, bias_ptr, out_ptr, m, n, num_outputs, is_row, is_output, HAS_BIAS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedLayer:
    """A layer's weights; see `QuantizedWeight` of the interface. All contiguous."""

    bits: int
    group_size: int
    """Of inputs that share a scale; all of them where there is one group."""
    num_groups: int
    num_inputs: int
    codes: Tensor
    """uint8 [N, K], or [N, ceil(K / 2)] for 4 bits."""
    scales: Tensor
    """[N, G]."""
    zeros: Tensor | None
    """uint8 [N, G]."""
    bias: Tensor | None
    """[N]."""
    activations: str
    """`none`, `token` or `group`."""


def quantized_linear(launcher: Launcher, x: Tensor, layer: QuantizedLayer) -> Tensor:
    """x' @ weight.T + bias for x [T, K] with dense rows, in x's dtype."""
    num_rows, num_outputs = x.shape[0], layer.codes.shape[0]
    out = x.new_empty((num_rows, num_outputs))
    values, x_scales, x_groups = x, x, 0
    if layer.activations != "none":
        x_groups = layer.num_groups if layer.activations == "group" else 1
        values, x_scales = round_rows(launcher, x, x_groups)
    entry = launcher.find(
        "quantized_linear", item_size=x.element_size(), rows=max(num_rows, 1), bits=layer.bits
    )
    tile = max(_MIN_TILE, min(entry.constants["BLOCK_M"], power_of_two(num_rows)))
    block_n = max(_MIN_TILE, min(entry.constants["BLOCK_N"], power_of_two(num_outputs)))
    block_k = min(entry.constants["BLOCK_K"], power_of_two(layer.group_size))
    launcher.start(
        quantized_linear_kernel,
        (ceil_div(num_rows, tile), ceil_div(num_outputs, block_n)),
        [
            *(values, x_scales, layer.codes, layer.scales),
            layer.codes if layer.zeros is None else layer.zeros,
            x if layer.bias is None else layer.bias,
            *(out, num_rows, num_outputs, values.stride(0), layer.codes.stride(0)),
        ],
        {
            "BITS": layer.bits,
            "GROUPS": layer.num_groups,
            "SIZE": layer.group_size,
            "X_GROUPS": x_groups,
            "HAS_ZEROS": layer.zeros is not None,
            "HAS_BIAS": layer.bias is not None,
            "IS_WHOLE": x_groups > 0 and (layer.bits == 4 or layer.zeros is None),
            "BLOCK_M": tile,
            "BLOCK_N": block_n,
            "BLOCK_K": max(_MIN_INPUTS, block_k),
        },
        entry,
    )
    return out


def round_rows(launcher: Launcher, x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Codes int8 [T, K] and scales float32 [T, G] of x [T, K] with dense rows."""
    num_rows, num_inputs = x.shape
    size = num_inputs // num_groups
    codes = torch.empty((num_rows, num_inputs), dtype=torch.int8, device=x.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x.device)
    entry = launcher.find("round_rows", width=size)
    rows = entry.constants["ROWS"]
    launcher.start(
        round_rows_kernel,
        (ceil_div(num_rows * num_groups, rows),),
        [x, codes, scales, num_rows, x.stride(0)],
        {"GROUPS": num_groups, "SIZE": size, "BLOCK": power_of_two(size), "ROWS": rows},
        entry,
    )
    return codes, scales
