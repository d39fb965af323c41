"""Reads the experts of a layer into the one shape that devices pack."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from quire.core.interface.experts import ExpertWeights, QuantizedExperts
from quire.core.interface.ops import Ops
from quire.core.models.decoder_spec import MixtureSpec
from quire.core.models.weights.quantization import quantize
from quire.core.models.weights.quantization_spec import QuantizationSpec
from quire.core.models.weights.weight_layout import MixtureTensors, TensorShape


class TensorReader(Protocol):
    """Where tensors come from."""

    def read(self, tensor: TensorShape) -> Tensor:
        """One tensor on the host, in any floating dtype."""
        ...

    def read_into(self, tensor: TensorShape, target: Tensor) -> None:
        """Writes one tensor to `target`, of its shape, on any device and in any floating dtype."""


def read_experts(
    tensors: MixtureTensors,
    mixture: MixtureSpec,
    source: TensorReader,
    *,
    dtype: torch.dtype,
    device: str,
) -> ExpertWeights:
    """gate_up [E, 2I, H] and down [E, H, I] of all experts, whatever way the files have them."""
    gate_up_bias = _read(tensors.gate_up_bias, source, dtype, device)
    if tensors.is_merged:
        read = _transposed if tensors.is_transposed else _as_stored
        gate_up, down = (
            read(part, source, dtype, device) for part in (tensors.gate_up[0], tensors.down[0])
        )
    else:
        gate_up = _stacked(tensors.gate_up, source, dtype, device, per_expert=2)
        down = _stacked(tensors.down, source, dtype, device, per_expert=1)
    if tensors.is_interleaved:
        gate_up = _in_halves(gate_up)
        gate_up_bias = None if gate_up_bias is None else _in_halves(gate_up_bias)
    return ExpertWeights(
        gate_up=gate_up,
        down=down,
        gate_up_bias=gate_up_bias,
        down_bias=_read(tensors.down_bias, source, dtype, device),
        activation=mixture.activation,
        alpha=mixture.alpha,
        limit=mixture.limit,
    )


def quantize_experts(experts: ExpertWeights, spec: QuantizationSpec, ops: Ops) -> QuantizedExperts:
    """Each expert's two layers as `spec` asks, like linear layers that stand alone."""
    return QuantizedExperts(
        gate_up=[quantize(weight, spec, ops=ops) for weight in experts.gate_up],
        down=[quantize(weight, spec, ops=ops) for weight in experts.down],
        gate_up_bias=experts.gate_up_bias,
        down_bias=experts.down_bias,
        activation=experts.activation,
        alpha=experts.alpha,
        limit=experts.limit,
    )


def size_of_experts(experts: ExpertWeights) -> int:
    """Bytes that the loaded experts hold."""
    biases = [b for b in (experts.gate_up_bias, experts.down_bias) if b is not None]
    return sum(tensor.nbytes for tensor in (experts.gate_up, experts.down, *biases))


def _stacked(
    parts: tuple[TensorShape, ...],
    source: TensorReader,
    dtype: torch.dtype,
    device: str,
    *,
    per_expert: int,
) -> Tensor:
    """Tensors [N, K], `per_expert` below one another for each expert: [E, per_expert * N, K]."""
    rows, columns = parts[0].shape
    stacked = torch.empty((len(parts), rows, columns), dtype=dtype, device=device)
    for place, part in zip(stacked, parts, strict=True):
        source.read_into(part, place)
    return stacked.view(-1, per_expert * rows, columns)


def _transposed(part: TensorShape, source: TensorReader, dtype: torch.dtype, device: str) -> Tensor:
    return source.read(part).transpose(1, 2).to(device, dtype).contiguous()


def _as_stored(part: TensorShape, source: TensorReader, dtype: torch.dtype, device: str) -> Tensor:
    target = torch.empty(part.shape, dtype=dtype, device=device)
    source.read_into(part, target)
    return target


def _in_halves(x: Tensor) -> Tensor:
    """Gate and up in turn along dimension 1, as all gates and then all ups."""
    return torch.cat((x[:, ::2], x[:, 1::2]), dim=1)


def _read(
    tensor: TensorShape | None, source: TensorReader, dtype: torch.dtype, device: str
) -> Tensor | None:
    return None if tensor is None else source.read(tensor).to(device, dtype)
