"""Root-mean-square norms, with and without a residual."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.launch import LaunchEntry, Launcher, ceil_div, power_of_two

MAX_WIDTH = 32768
"""The widest row that one program holds."""


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    width,
    eps,
    inner,
    x_outer_stride,
    x_inner_stride,
    residual_stride,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows; row r of x lies at r // inner * outer stride + r % inner * inner stride."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < width)[None, :]
    start = row // inner * x_outer_stride + row % inner * x_inner_stride
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        place = residual_ptr + (row * residual_stride)[:, None] + column[None, :]
        x = x + tl.load(place, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(place, rounded, mask=mask)
        x = rounded.to(tl.float32)
    mean = tl.sum(x * x, 1) / width
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(mean + eps))[:, None] * weight[None, :]
    out = out_ptr + (row * width)[:, None] + column[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(launcher: Launcher, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """The norm of each last dimension of x [..., H], into out, contiguous and of x's shape.

    x has a dense last dimension; H <= `MAX_WIDTH`. Source: Zhang & Sennrich 2019, eq. 4.
    """
    width = x.shape[-1]
    rows = x if x.dim() in {2, 3} else x.reshape(-1, width)
    inner = rows.shape[1] if rows.dim() == 3 else 1
    strides = (rows.stride(0), rows.stride(1) if rows.dim() == 3 else 0)
    num_rows = x.numel() // width if width else 0
    _start(launcher, (rows, weight, weight, out), num_rows, width, eps, inner, (*strides, 0))


def add_rms_norm(
    launcher: Launcher, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor
) -> None:
    """Adds x [T, H] to residual [T, H], rounded, and norms the sum into out [T, H].

    x and residual have dense last dimensions. Mutates residual and out.
    """
    num_rows, width = x.shape
    strides = (x.stride(0), 0, residual.stride(0))
    _start(launcher, (x, residual, weight, out), num_rows, width, eps, 1, strides, adds=True)


def _start(
    launcher: Launcher,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    num_rows: int,
    width: int,
    eps: float,
    inner: int,
    strides: tuple[int, int, int],
    *,
    adds: bool = False,
) -> None:
    x, residual, weight, out = tensors
    entry = launcher.find("rms_norm", width=width)
    rows = rows_per_program(entry, num_rows, width)
    launcher.start(
        rms_norm_kernel,
        (ceil_div(num_rows, rows),),
        [x, residual, weight, out, num_rows, width, eps, inner, *strides],
        {"HAS_RESIDUAL": adds, "ROWS": rows, "BLOCK": power_of_two(width)},
        entry,
    )


def rows_per_program(entry: LaunchEntry, num_rows: int, width: int) -> int:
    """How many rows of `width` make a tile of about the entry's `TILE` elements, at least 1."""
    wanted = entry.constants["TILE"] // power_of_two(width)
    return max(1, min(wanted, power_of_two(num_rows)))
