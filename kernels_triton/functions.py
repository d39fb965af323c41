"""Functions that Triton's language lacks, in operations that every target and the interpreter have.

The vendors' device libraries (`libdevice`) differ between vendors and are not interpreted, so they
are not used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """The hyperbolic tangent of float32, good to two units in the last place.

    Near 0, 1 - 2 / (e^2x + 1) would cancel; there it is an odd polynomial.
    Source: Moshier, Cephes library, tanhf.
    """
    size = tl.abs(x)
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    near = series * square * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    far = tl.where(x < 0, -far, far)
    return tl.where(size < 0.625, near, far)


@triton.jit
def ordered_key(x):
    """int32 keys in the order of the float32 `x`; both zeros have one key."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def round_to_even(x):
    """float32 `x` to the nearest whole number, halves to even; |x| < 2^22.

    The sum has no bits left below one, so the device's own rounding does it.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def scale_part(
    part,
    scales_ptr,
    x_scales_ptr,
    m,
    n,
    group,
    is_row,
    is_output,
    GROUPS: tl.constexpr,
    X_GROUPS: tl.constexpr,
):
    """The products of one group of inputs [M, N], times scales of weights and of X_GROUPS of x."""
    scale = tl.load(scales_ptr + n * GROUPS + group, mask=is_output, other=0.0)
    part = part * scale.to(tl.float32)[None, :]
    if X_GROUPS > 0:
        x_group = group if X_GROUPS > 1 else 0
        x_scale = tl.load(x_scales_ptr + m * X_GROUPS + x_group, mask=is_row, other=0.0)
        part = part * x_scale[:, None]
    return part


@triton.jit
def store_tile(
    acc, bias_ptr, out_ptr, m, n, num_outputs, is_row, is_output, HAS_BIAS: tl.constexpr
):
    """Writes a tile [M, N] of a linear layer, its bias added."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=is_output, other=0.0).to(tl.float32)[None, :]
    place = out_ptr + (m.to(tl.int64) * num_outputs)[:, None] + n[None, :]
    mask = is_row[:, None] & is_output[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=mask)
