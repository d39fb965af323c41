"""Quantized linear layers in plain torch: weights widened at load, activations rounded anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from quire.core.interface import PackedLinear, QuantizedWeight

_MOST = 127
"""The largest rounded activation: the range is symmetric."""
_MOST_FLOAT8 = 448
_FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True, eq=False)
class WidenedWeights:
    """A quantized layer with its weights in float32."""

    weight: Tensor
    """float32 [N, K]."""
    bias: Tensor | None
    activations: str
    group_size: int
    encoding: str = "integer"


def pack(weight: QuantizedWeight, bias: Tensor | None, dtype: str) -> PackedLinear:
    """`Ops.pack_quantized_linear`."""
    wide = widen(weight)
    return PackedLinear(
        num_inputs=weight.num_inputs,
        num_outputs=weight.num_outputs,
        dtype=dtype,
        format=f"{weight.scheme or weight.format_name} as float32",
        size_bytes=wide.nbytes,
        payload=WidenedWeights(wide, bias, weight.activations, weight.group_size, weight.encoding),
    )


def widen(weight: QuantizedWeight) -> Tensor:
    """(code - zero) * scale: float32 [N, K]."""
    if weight.encoding != "integer":
        numbers = weight.codes.view(_FLOAT8).float()
        grouped = numbers.reshape(weight.num_outputs, weight.num_groups, -1)
        return (grouped * weight.scales.float().unsqueeze(-1)).flatten(1)
    codes = unpack_codes(weight.codes, weight.bits, weight.num_inputs).float()
    grouped = codes.reshape(weight.num_outputs, weight.num_groups, -1)
    if weight.zeros is None:
        grouped = grouped - float(1 << (weight.bits - 1))
    else:
        grouped = grouped - weight.zeros.float().unsqueeze(-1)
    return (grouped * weight.scales.float().unsqueeze(-1)).flatten(1)


def unpack_codes(codes: Tensor, bits: int, num_inputs: int) -> Tensor:
    """One code a byte: uint8 [N, K]."""
    if bits == 8:
        return codes
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :num_inputs]


def multiply(x: Tensor, layer: WidenedWeights) -> Tensor:
    """x' @ weight.T + bias, in float32 and rounded once."""
    bias = None if layer.bias is None else layer.bias.float()
    rounded = round_activations(x.float(), layer)
    return F.linear(rounded, layer.weight, bias).to(x.dtype)


def round_activations(x: Tensor, layer: WidenedWeights) -> Tensor:
    """x' of `QuantizedWeight.activations`, for x float32 [T, K]."""
    activations, group_size = layer.activations, layer.group_size
    is_whole = layer.encoding == "integer"
    if activations == "none":
        return x
    if activations not in ("token", "group"):
        raise ValueError(f"activations {activations!r}; there are none, token, group")
    size = group_size if activations == "group" and group_size else x.shape[1]
    grouped = x.reshape(x.shape[0], -1, size)
    scale = grouped.abs().amax(-1, keepdim=True) / (_MOST if is_whole else _MOST_FLOAT8)
    ratio = grouped / scale.masked_fill(scale == 0, 1.0)
    q = torch.round(ratio) if is_whole else ratio.to(_FLOAT8).float()
    return (q * scale).flatten(1)
