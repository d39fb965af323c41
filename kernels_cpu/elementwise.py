"""Norms, gated activations and rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu

GATES = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""The numbers by which the compiled module knows gates."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x, out [T, H] with dense rows, weight [H]; one dtype (float32, bfloat16, float16), on the CPU.
    Computes in float32 and rounds once. `out` may be `x`. Raises: ValueError, TypeError.
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    _norm(x, None, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """residual += x, in place and rounded to its dtype; out = the RMS norm of that sum.

    x, residual, out [T, H] with dense rows, weight [H]; one dtype, on the CPU. Mutates `residual`
    and `out`; `out` may be `x`. Raises: ValueError, TypeError.
    """
    _norm(x, residual, weight, eps, out)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor) -> None:
    native.require_native()
    dtype = x.dtype
    x_stride = checks.check_dense("x", x, dtype, 2)[0]
    out_stride = checks.check_dense("out", out, dtype, 2)[0]
    num_rows, width = x.shape
    checks.check_shape("out", out, (num_rows, width))
    checks.check_dense("weight", weight, dtype, 1)
    checks.check_shape("weight", weight, (width,))
    residual_address, residual_stride = 0, 0
    if residual is not None:
        residual_stride = checks.check_dense("residual", residual, dtype, 2)[0]
        checks.check_shape("residual", residual, (num_rows, width))
        residual_address = residual.data_ptr()
    _cpu.rms_norm(
        checks.dtype_code(dtype),
        x.data_ptr(),
        residual_address,
        weight.data_ptr(),
        out.data_ptr(),
        num_rows,
        width,
        x_stride,
        residual_stride,
        out_stride,
        eps,
    )


def silu_and_mul(x: Tensor, out: Tensor) -> None:
    """out = silu(x[:, :I]) * x[:, I:]. x [T, 2I], out [T, I]; see `gated_activation`."""
    gated_activation(x, "silu", out)


def gelu_tanh_and_mul(x: Tensor, out: Tensor) -> None:
    """out = gelu(x[:, :I]) * x[:, I:], GELU by its tanh formula; see `gated_activation`."""
    gated_activation(x, "gelu_tanh", out)


def gelu_and_mul(x: Tensor, out: Tensor) -> None:
    """out = gelu(x[:, :I]) * x[:, I:], GELU by the error function; see `gated_activation`."""
    gated_activation(x, "gelu", out)


def gated_activation(x: Tensor, kind: str, out: Tensor) -> None:
    """out = act(x[:, :I]) * x[:, I:]. x [T, 2I], out [T, I] with dense rows, one dtype, on the CPU.

    `kind` is `silu`, `gelu_tanh` or `gelu`. Computes in float32 and rounds once.
    Raises: ValueError, TypeError. Source: Shazeer 2020, eq. 5; Hendrycks & Gimpel 2016.
    """
    native.require_native()
    if kind not in GATES:
        raise ValueError(f"no gate named {kind!r}; there are {', '.join(GATES)}")
    x_stride = checks.check_dense("x", x, x.dtype, 2)[0]
    out_stride = checks.check_dense("out", out, x.dtype, 2)[0]
    num_rows, width = out.shape
    checks.check_shape("x", x, (num_rows, 2 * width))
    _cpu.gated_activation(
        checks.dtype_code(x.dtype),
        GATES[kind],
        x.data_ptr(),
        out.data_ptr(),
        num_rows,
        width,
        x_stride,
        out_stride,
    )


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> None:
    """Rotates the first 2F features of every head of q [T, Hq, D] and k [T, Hk, D], in place.

    cos, sin float32 [T, F], 2F <= D. Pairs are (i, i + F), or (2i, 2i + 1) where `is_interleaved`.
    Heads may be strided views with a dense last dimension; q and k share one dtype, on the CPU.
    Computes in float32 and rounds once. Raises: ValueError, TypeError.
    Source: Su et al. 2021, eq. 34.
    """
    native.require_native()
    _rotate("q", q, cos, sin, is_interleaved)
    _rotate("k", k, cos, sin, is_interleaved)


def _rotate(name: str, x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> None:
    token_stride, head_stride, _ = checks.check_dense(name, x, x.dtype, 3)
    num_tokens, num_heads, head_size = x.shape
    cos_stride, sin_stride = checks.check_rotation(cos, sin, num_tokens, head_size)
    _cpu.rotary(
        checks.dtype_code(x.dtype),
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        num_tokens,
        num_heads,
        cos.shape[1],
        token_stride,
        head_stride,
        cos_stride,
        sin_stride,
        is_interleaved,
    )
