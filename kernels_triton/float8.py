"""Linear layers whose weights are 8-bit floats: multiplied as they are, or widened in registers.

Weights are OCP's e4m3. Matrix units of some devices have AMD's own flavour instead (FNUZ): there
the same bits are half the number, so codes stay as they are, zeros lose their sign, and scales
are doubled. What is computed is the same number everywhere.
Source: Micikevicius et al. 2022, FP8 formats for deep learning, section 3; DeepSeek-V3 technical
report 2024, section 3.3, for groups of inputs.
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
UNITS = {"": 0, "float8_e4m3fn": 1, "float8_e4m3fnuz": 2}
"""What matrix units multiply: no 8-bit floats, OCP's, AMD's own. The kernels' `UNITS`."""
_MINUS_ZERO = 0x80


@triton.jit
def round_rows_float8_kernel(
    x_ptr,
    out_ptr,
    scales_ptr,
    num_rows,
    x_stride,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS groups of SIZE inputs: numbers of e4m3, and the scale, largest magnitude over 448.

    With units the numbers are stored as their bits, else as numbers in `out`'s dtype. They are
    rounded by hand: not every device can, and those that can saturate differently.
    """
    group = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)
    is_group = group < num_rows * GROUPS
    mask = is_group[:, None] & (i < SIZE)[None, :]
    row = (group // GROUPS).to(tl.int64) * x_stride + group % GROUPS * SIZE
    x = tl.load(x_ptr + row[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), 448.0)
    x = tl.div_rn(x, tl.where(scale == 0, 1.0, scale)[:, None])
    # The step between neighbours: three bits below the leading one, 2^-9 among the smallest.
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    inverse = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    near = round_to_even(x * inverse) * step
    # What is no number stays none; minus zero has no code in every flavour.
    x = tl.where(near != near, near, tl.clamp(near, -448.0, 448.0))  # noqa: PLR0124
    x = tl.where(x == 0, 0.0, x)
    place = out_ptr + (group.to(tl.int64) * SIZE)[:, None] + i[None, :]
    if UNITS == 1:
        tl.store(place, x.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=mask)
    elif UNITS == 2:
        tl.store(place, (x * 0.5).to(tl.float8e4b8).to(tl.uint8, bitcast=True), mask=mask)
        scale = scale * 2.0
    else:
        tl.store(place, x.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + group, scale, mask=is_group)


@triton.jit
def _add_products(x, code, part, wide: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Part + x @ code.T, for bits [N, BLOCK_K] and x in bits of the units or as it is."""
    if UNITS == 1:
        weight = tl.trans(code.to(tl.float8e4nv, bitcast=True))
        x = x.to(tl.float8e4nv, bitcast=True)
        part = tl.dot(x, weight, part, max_num_imprecise_acc=BLOCK_K)
    elif UNITS == 2:
        weight = tl.trans(code.to(tl.float8e4b8, bitcast=True))
        part = tl.dot(x.to(tl.float8e4b8, bitcast=True), weight, part)
    else:
        # Moved into the places of a half, a number is less by 2^8.
        bits = code.to(tl.uint16)
        half = ((bits & 128) << 8) | ((bits & 127) << 7)
        weight = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        weight = tl.trans(weight.to(wide))
        part = tl.dot(x.to(tl.float32).to(wide), weight, part, input_precision="ieee")
    return part


@triton.jit
def float8_linear_kernel(
    x_ptr,
    x_scales_ptr,
    codes_ptr,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    x_stride,
    codes_stride,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    X_GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of x @ (codes * scales).T + bias, group by group of SIZE inputs.

    X_GROUPS: scales of a row of x; 0 for x as it is. With UNITS, x has bits of the units' flavour,
    and each tile's sum is carried over into float32: Hopper's units sum in fewer bits.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_output = m < num_rows, n < num_outputs
    x_rows = x_ptr + m.to(tl.int64) * x_stride
    code_rows = codes_ptr + n.to(tl.int64) * codes_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for group in range(GROUPS):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for begin in range(0, SIZE, BLOCK_K):
            i = begin + tl.arange(0, BLOCK_K)
            k = group * SIZE + i
            is_input = (i < SIZE)[None, :]
            x = tl.load(x_rows[:, None] + k[None, :], mask=is_row[:, None] & is_input, other=0)
            mask = is_output[:, None] & is_input
            code = tl.load(code_rows[:, None] + k[None, :], mask=mask, other=0)
            part = _add_products(x, code, part, out_ptr.dtype.element_ty, UNITS, BLOCK_K)
        acc += scale_part(
            part, scales_ptr, x_scales_ptr, m, n, group, is_row, is_output, GROUPS, X_GROUPS
        )
    store_tile(acc, bias_ptr, out_ptr, m, n, num_outputs, is_row, is_output, HAS_BIAS)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Float8Layer:
    """A layer's weights, as `pack_float8` makes them. All contiguous."""

    units: str
    """A key of `UNITS`: in which flavour codes and rounded inputs are multiplied."""
    group_size: int
    """Of inputs that share a scale; all of them where there is one group."""
    num_groups: int
    codes: Tensor
    """uint8 [N, K], bits of the units' flavour; of OCP's without units."""
    scales: Tensor
    """[N, G]."""
    bias: Tensor | None
    """[N]."""
    activations: str
    """`none`, `token` or `group`."""


def pack_float8(
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    *,
    group_size: int,
    activations: str,
    units: str,
) -> Float8Layer:
    """The layer of codes uint8 [N, K] (bits of e4m3fn) and scales [N, G], for a device's units.

    Inputs that are not rounded are multiplied without them, in their own dtype.
    """
    units = units if activations != "none" else ""
    codes, scales = in_flavour(codes, scales, units)
    return Float8Layer(
        units=units,
        group_size=group_size or codes.shape[1],
        num_groups=scales.shape[1],
        codes=codes.contiguous(),
        scales=scales.contiguous(),
        bias=bias,
        activations=activations,
    )


def in_flavour(codes: Tensor, scales: Tensor, units: str) -> tuple[Tensor, Tensor]:
    """Codes of e4m3fn and their scales, so that `units` read the same numbers."""
    if units != "float8_e4m3fnuz":
        return codes, scales
    # Its code of minus zero is no number.
    return codes.masked_fill(codes == _MINUS_ZERO, 0), scales.float() * 2


def float8_linear(launcher: Launcher, x: Tensor, layer: Float8Layer) -> Tensor:
    """x' @ weight.T + bias for x [T, K] with dense rows, in x's dtype."""
    num_rows, num_outputs = x.shape[0], layer.codes.shape[0]
    out = x.new_empty((num_rows, num_outputs))
    values, x_scales, x_groups = x, x, 0
    if layer.activations != "none":
        x_groups = layer.num_groups if layer.activations == "group" else 1
        values, x_scales = round_rows_float8(launcher, x, x_groups, layer.units)
    entry = launcher.find(
        "float8_linear",
        item_size=values.element_size(),
        rows=max(num_rows, 1),
    )
    tile = max(_MIN_TILE, min(entry.constants["BLOCK_M"], power_of_two(num_rows)))
    block_n = max(_MIN_TILE, min(entry.constants["BLOCK_N"], power_of_two(num_outputs)))
    block_k = min(entry.constants["BLOCK_K"], power_of_two(layer.group_size))
    launcher.start(
        float8_linear_kernel,
        (ceil_div(num_rows, tile), ceil_div(num_outputs, block_n)),
        [
            *(values, x_scales, layer.codes, layer.scales),
            x if layer.bias is None else layer.bias,
            *(out, num_rows, num_outputs, values.stride(0), layer.codes.stride(0)),
        ],
        {
            "UNITS": UNITS[layer.units],
            "GROUPS": layer.num_groups,
            "SIZE": layer.group_size,
            "X_GROUPS": x_groups,
            "HAS_BIAS": layer.bias is not None,
            "BLOCK_M": tile,
            "BLOCK_N": block_n,
            "BLOCK_K": max(_MIN_INPUTS, block_k),
        },
        entry,
    )
    return out


def round_rows_float8(
    launcher: Launcher, x: Tensor, num_groups: int, units: str
) -> tuple[Tensor, Tensor]:
    """Rounded inputs [T, K] of x [T, K] with dense rows, and their scales float32 [T, G].

    uint8 bits of the flavour `units`; without units numbers in x's dtype, which has all of them.
    """
    num_rows, num_inputs = x.shape
    size = num_inputs // num_groups
    dtype = torch.uint8 if units else x.dtype
    out = torch.empty((num_rows, num_inputs), dtype=dtype, device=x.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x.device)
    entry = launcher.find("round_rows_float8", width=size)
    rows = entry.constants["ROWS"]
    launcher.start(
        round_rows_float8_kernel,
        (ceil_div(num_rows * num_groups, rows),),
        [x, out, scales, num_rows, x.stride(0)],
        {
            "UNITS": UNITS[units],
            "GROUPS": num_groups,
            "SIZE": size,
            "BLOCK": power_of_two(size),
            "ROWS": rows,
        },
        entry,
    )
    return out, scales


add_products = _add_products
"""For kernels of other modules that multiply such codes."""
