"""The operators of a model's layers, by their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_ERF = np.frompyfunc(math.erf, 1, 1)


def embedding(token_ids: Array, weight: Array) -> Array:
    """Row token_ids[t] of weight [V, H]: [T, H]."""
    return np.asarray(weight[token_ids])


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """out[t, n] = sum_k x[t, k] weight[n, k] + bias[n]: [T, N]."""
    product = x @ weight.T
    return product if bias is None else product + bias


def quantized_linear(
    x: Array,
    codes: Array,
    scales: Array,
    zeros: Array | None,
    bias: Array | None,
    *,
    bits: int,
    group_size: int,
    activations: str,
) -> Array:
    """x' @ weight.T + bias with weight = (code - zero) * scale: [T, N].

    codes [N, K], or [N, ceil(K / 2)] with two of 4 bits in a byte; x' as activations are rounded,
    with the division in float32 whatever the precision of the rest.
    """
    num_inputs = x.shape[1]
    if bits == 4:
        codes = np.stack((codes & 15, codes >> 4), axis=-1).reshape(len(codes), -1)[:, :num_inputs]
    size = group_size or num_inputs
    out = np.zeros((len(x), len(codes)), x.dtype)
    row = _rounded_activations(x) if activations == "token" else x
    for group in range(num_inputs // size):
        inputs = slice(group * size, (group + 1) * size)
        part = row[:, inputs]
        if activations == "group":
            part = _rounded_activations(part)
        zero = 2 ** (bits - 1) if zeros is None else zeros[:, group, None].astype(x.dtype)
        weight = codes[:, inputs].astype(x.dtype) - zero
        out += part @ (weight * scales[:, group, None]).T
    return out if bias is None else out + bias


def _rounded_activations(x: Array) -> Array:
    """q * s with q = round(x / s), s = max |x| / 127; zeros stay zeros."""
    narrow = x.astype(np.float32)
    scale = np.abs(narrow).max(axis=1, keepdims=True) / np.float32(127)
    q = np.rint(narrow / np.where(scale == 0, np.float32(1), scale))
    return np.asarray(q.astype(x.dtype) * scale.astype(x.dtype))


def float8_linear(
    x: Array, codes: Array, scales: Array, bias: Array, *, group_size: int, activations: str
) -> Array:
    """x' @ weight.T + bias with weight = the number of its code * scale: [T, N].

    codes [N, K]: a sign, four bits of exponent less 7, three of fraction. x' as activations are
    rounded, with the division in float32 whatever the precision of the rest.
    Source: Micikevicius et al. 2022, table 1.
    """
    exponent, fraction = (codes >> 3 & 15).astype(int), (codes & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    numbers = np.where(codes >> 7 == 1, -size, size).astype(x.dtype)
    width = group_size or x.shape[1]
    out = np.zeros((len(x), len(codes)), x.dtype)
    row = _rounded_to_float8(x) if activations == "token" else x
    for group in range(x.shape[1] // width):
        inputs = slice(group * width, (group + 1) * width)
        part = _rounded_to_float8(x[:, inputs]) if activations == "group" else row[:, inputs]
        out += part @ (numbers[:, inputs] * scales[:, group, None]).T
    return np.asarray(out + bias)


def _rounded_to_float8(x: Array) -> Array:
    """q * s with q the number of e4m3 next to x / s, s = max |x| / 448; zeros stay zeros."""
    narrow = x.astype(np.float32)
    scale = np.abs(narrow).max(axis=1, keepdims=True) / np.float32(448)
    ratio = (narrow / np.where(scale == 0, np.float32(1), scale)).astype(np.float64)
    step = np.exp2(np.maximum(np.frexp(ratio)[1] - 1, -6) - 3.0)
    q = np.clip(np.rint(ratio / step) * step, -448, 448)
    return np.asarray(q.astype(x.dtype) * scale.astype(x.dtype))


def add_lora(
    out: Array,
    x: Array,
    down: Array,
    up: Array,
    adapter_ids: Array,
    rounded: Callable[[Array], Array],
) -> Array:
    """out[t] + up[a] @ (down[a] @ x[t]) for the tokens with an adapter a: [T, N]."""
    changed = out.copy()
    for token, adapter in enumerate(adapter_ids):
        if adapter >= 0:
            changed[token] += up[adapter] @ rounded(down[adapter] @ x[token])
    return changed


def head_linear(x: Array, weight: Array) -> Array:
    """out[t, m, n] = sum_k weight[m, n, k] x[t, m, k]: [T, M, N]."""
    return np.stack([x[:, m] @ weight[m].T for m in range(x.shape[1])], axis=1)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """X / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Source: Zhang & Sennrich 2019, eq. 4.
    """
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    return np.asarray(x / np.sqrt(mean_square + x.dtype.type(eps)) * weight)


def add_rms_norm(
    x: Array, residual: Array, weight: Array, eps: float, rounded: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The norm of residual + x, and that sum, which `rounded` brings to the working dtype."""
    total = rounded(residual + x)
    return rms_norm(total, weight, eps), total


def gated_activation(x: Array, kind: str) -> Array:
    """act(x[:, :I]) * x[:, I:] for x [T, 2I]: [T, I].

    Source: Shazeer 2020 (GLU variants), eq. 5; Hendrycks & Gimpel 2016, section 2.
    """
    gate, up = np.split(x, 2, axis=-1)
    return np.asarray(_ACTIVATIONS[kind](gate) * up)


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):  # exp of a large number is infinite, and its inverse 0
        return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Array) -> Array:
    erf = np.asarray(_ERF(x / math.sqrt(2))).astype(x.dtype)
    return np.asarray(x / 2 * (1 + erf))


def _gelu_tanh(x: Array) -> Array:
    inner = x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x**3)
    return np.asarray(x / 2 * (1 + np.tanh(inner)))


_ACTIVATIONS = {"silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh}


def rotary(heads: Array, cos: Array, sin: Array, *, is_interleaved: bool) -> Array:
    """The pairs of the first 2F features of heads [T, n, D], turned by their angle: [T, n, D].

    Pair i is (i, i + F), or (2i, 2i + 1) where `is_interleaved`; cos, sin [T, F].
    Source: Su et al. 2021, eq. 34.
    """
    num_pairs = cos.shape[-1]
    turned = heads.copy()
    for i in range(num_pairs):
        first, second = (2 * i, 2 * i + 1) if is_interleaved else (i, i + num_pairs)
        a, b = heads[..., first], heads[..., second]
        c, s = cos[:, i : i + 1], sin[:, i : i + 1]
        turned[..., first] = a * c - b * s
        turned[..., second] = b * c + a * s
    return turned


def soft_cap(x: Array, cap: float) -> Array:
    """Cap * tanh(x / cap). Source: Gemma 2 report, section 2."""
    return np.asarray(np.tanh(x / x.dtype.type(cap)) * x.dtype.type(cap))
