"""Quantizes the weights of linear layers at load, on any torch device.

`int8`: one scale for each output, symmetric, and activations rounded by the token. `int4`: groups
of inputs with scale and zero, whose range is cut where that makes the squared error of the weights
smaller, and activations rounded by the group. A layer whose inputs groups do not divide, and the
head, whose errors go straight into the logits, are kept in 8 bits.

What is written here defines the numbers: each line is one operation in float32, rounded once, and
sums have an order, so that a device's own `Ops.quantize_linear` gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from quire.core.interface.ops import Ops
from quire.core.interface.quantization import QuantizedWeight
from quire.core.models.weights.quantization_spec import QuantizationSpec
from quire.core.models.weights.weight_layout import LinearTensors, MixtureTensors

_MOST_INT8, _MOST_INT4 = 127, 15
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Parts of a group's range that are tried."""
_LEAST_SCALE = torch.finfo(torch.float32).tiny
"""Of a group in 4 bits: a smaller one has no reciprocal, and its weights are nothing."""
_CHUNK_ELEMENTS = 1 << 18
"""Weights that are quantized at a time: what the steps between hold stays in a cache."""


def linear_inputs(tensors: object) -> Iterator[tuple[str, int]]:
    """Name and number of inputs of the linear layers among the tensors of a model or a part of it.

    Without the head, which has no groups.
    """
    if isinstance(tensors, LinearTensors):
        yield tensors.weights[0].name, tensors.weights[0].shape[1]
    elif isinstance(tensors, MixtureTensors):
        axis = -2 if tensors.is_merged and tensors.is_transposed else -1
        for part in (tensors.gate_up[0], tensors.down[0]):
            yield part.name, part.shape[axis]
        yield from linear_inputs((tensors.shared, tensors.shared_gate))
    elif isinstance(tensors, tuple | list):
        for part in tensors:
            yield from linear_inputs(part)
    elif is_dataclass(tensors):
        for field in fields(tensors):
            if field.name != "lm_head":
                yield from linear_inputs(getattr(tensors, field.name))


def quantize(
    weight: Tensor, spec: QuantizationSpec, *, is_head: bool = False, ops: Ops | None = None
) -> QuantizedWeight:
    """The weight [N, K], in any floating dtype and on its own device, as `spec` asks.

    By the device's own `ops` where they do it; the numbers are the same.
    """
    group_size = 0 if is_head or spec.scheme == "int8" else spec.group_size_of(weight.shape[1])
    bits = 4 if group_size else 8
    quantized = None if ops is None else ops.quantize_linear(weight, bits, group_size)
    if quantized is not None:
        return quantized
    return quantize_int4(weight, group_size) if group_size else quantize_int8(weight)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """One scale for each output: max |w| / 127. Source: Dettmers et al. 2022, section 2."""
    num_outputs, num_inputs = weight.shape
    codes = torch.empty((num_outputs, num_inputs), dtype=torch.uint8, device=weight.device)
    scales = torch.empty((num_outputs, 1), dtype=torch.float32, device=weight.device)
    for rows in _chunks(weight):
        wide = weight[rows].float()
        largest = wide.abs().amax(1, keepdim=True)
        # By a tensor: some devices multiply by the reciprocal of a plain number.
        scale = largest / torch.full_like(largest, _MOST_INT8)
        scales[rows] = scale
        # A new tensor: `wide` may be the weight itself.
        ratio = wide / scale.masked_fill(scale == 0, 1.0)
        codes[rows] = ratio.round_().clamp_(-_MOST_INT8, _MOST_INT8).add_(128).to(torch.uint8)
    return QuantizedWeight(
        bits=8,
        group_size=0,
        num_inputs=num_inputs,
        codes=codes,
        scales=scales,
        activations="token",
        scheme="int8",
    )


def quantize_int4(weight: Tensor, group_size: int) -> QuantizedWeight:
    """A scale in bfloat16 and a zero for each output and group of inputs.

    Of several parts of a group's range the one with the least squared error is kept, as rounding
    most weights finer may be worth cutting the largest. `group_size` is a power of two, at least 2,
    that divides K.
    """
    num_outputs, num_inputs = weight.shape
    shape = (num_outputs, num_inputs // group_size)
    device = weight.device
    codes = torch.empty((num_outputs, num_inputs // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(shape, dtype=torch.bfloat16, device=device)
    zeros = torch.empty(shape, dtype=torch.uint8, device=device)
    for rows in _chunks(weight):
        grouped = weight[rows].float().reshape(-1, shape[1], group_size)
        scale, zero = _best_range(grouped)
        code = _encode(grouped, scale, zero).flatten(1).to(torch.uint8)
        codes[rows] = code[:, 0::2] | code[:, 1::2] << 4
        scales[rows] = scale.squeeze(-1).bfloat16()
        zeros[rows] = zero.squeeze(-1).to(torch.uint8)
    return QuantizedWeight(
        bits=4,
        group_size=group_size,
        num_inputs=num_inputs,
        codes=codes,
        scales=scales,
        zeros=zeros,
        activations="group",
        scheme="int4",
    )


def _chunks(weight: Tensor) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(weight.shape[1], 1))
    for row in range(0, weight.shape[0], step):
        yield slice(row, row + step)


def _best_range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G, 1] of the least squared error; the first of those tried on a tie."""
    # A range without 0 would leave no code for it, nor a zero that fits into 4 bits.
    low = grouped.amin(-1, keepdim=True).clamp_max_(0)
    high = grouped.amax(-1, keepdim=True).clamp_min_(0)
    span = (high - low).abs_()  # 0 - 0 may be -0
    best_scale = torch.zeros_like(low)
    best_zero = torch.zeros_like(low)
    best_error = torch.full_like(low, float("inf"))
    for shrink in _SHRINKS:
        scale = (span * (shrink / _MOST_INT4)).bfloat16().float()
        scale = scale.masked_fill(scale < _LEAST_SCALE, 0.0)
        zero = (-low * shrink * _inverse(scale)).round_().clamp_(0, _MOST_INT4)
        decoded = (_encode(grouped, scale, zero) - zero).mul_(scale)
        error = _fold(decoded.sub_(grouped).square_())
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_zero = torch.where(is_better, zero, best_zero)
    return best_scale, best_zero


def _encode(grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (grouped * _inverse(scale)).round_().add_(zero).clamp_(0, _MOST_INT4)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where the scale is 0."""
    return scale.masked_fill(scale == 0, float("inf")).reciprocal_()


def _fold(terms: Tensor) -> Tensor:
    """The sum over a last dimension of 2^n, [..., 1]: its second half is added to the first."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms
