"""What quantizing weights gives, operation by operation in float32; see `Ops.quantize_linear`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_F = np.float32
_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
_LEAST_SCALE = np.finfo(_F).tiny


def int8(weight: Array) -> dict[str, Array]:
    """Codes and scales of weight [N, K], with one scale a row."""
    weight = weight.astype(_F)
    scales = np.abs(weight).max(axis=1, keepdims=True) / _F(127)
    ratio = weight / np.where(scales == 0, _F(1), scales)
    codes = np.clip(np.rint(ratio), -127, 127) + 128
    return {"codes": codes.astype(np.uint8), "scales": scales}


def int4(weight: Array, group_size: int) -> dict[str, Array]:
    """Codes, two in a byte, scales and zeros of weight [N, K], group by group."""
    grouped = weight.astype(_F).reshape(len(weight), -1, group_size)
    shape = grouped.shape[:2]
    codes = np.empty(grouped.shape, np.uint8)
    scales, zeros = np.empty(shape, _F), np.empty(shape, np.uint8)
    for row in range(shape[0]):
        for group in range(shape[1]):
            at = row, group
            codes[at], scales[at], zeros[at] = _quantize_group(grouped[at])
    flat = codes.reshape(len(weight), -1)
    return {"codes": flat[:, ::2] | flat[:, 1::2] << 4, "scales": scales, "zeros": zeros}


def _quantize_group(w: Array) -> tuple[Array, np.float32, np.float32]:
    """The best of the parts of a group's range."""
    low, high = np.minimum(w.min(), _F(0)), np.maximum(w.max(), _F(0))
    least, best = _F(np.inf), (np.zeros_like(w), _F(0), _F(0))
    for part in _PARTS:
        scale = _to_bfloat16(_F(high - low) * _F(part / 15))
        scale = _F(0) if scale < _LEAST_SCALE else scale
        inverse = _F(0) if scale == 0 else _F(1) / scale
        zero = np.clip(np.rint(-low * _F(part) * inverse), _F(0), _F(15))
        codes = np.clip(np.rint(w * inverse) + zero, _F(0), _F(15))
        error = _fold(np.square((codes - zero) * scale - w))
        if error < least:
            least, best = error, (codes, scale, zero)
    return best


def _fold(terms: Array) -> np.float32:
    """The second half of the terms is added to the first until one is left."""
    while len(terms) > 1:
        half = len(terms) // 2
        terms = terms[:half] + terms[half:]
    return _F(terms[0])


def _to_bfloat16(x: np.float32) -> np.float32:
    """To nearest, halves to even."""
    bits = int(x.view(np.uint32))
    rounded = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000
    return _F(np.uint32(rounded).view(_F))
