"""Mixers of state-space models by the compiled kernels: which they take, and how tensors go in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.core.interface import (
    DeltaMixerParts,
    FusedMixer,
    MixerParts,
    PackedLinear,
    StatePieces,
)


def fuse(parts: MixerParts) -> FusedMixer | None:
    """One call for a mixer; None where a product of it is not by the compiled kernels."""
    mixer = mixer_of(parts)
    return None if mixer is None else FusedCpuMixer(mixer)


def fuse_delta(parts: DeltaMixerParts) -> FusedMixer | None:
    """One call for a mixer; None where a product of it is not by the compiled kernels."""
    mixer = delta_of(parts)
    return None if mixer is None else FusedCpuMixer(mixer)


def mixer_of(parts: MixerParts) -> kernels_cpu.FusedMixer | None:
    """The kernels of a mixer of Mamba or Mamba-2."""
    dtype = parts.conv.dtype
    dense = (parts.conv_bias, parts.norm, *(parts.inner_norms or ()))
    if any(tensor is not None and tensor.dtype != dtype for tensor in dense):
        return None
    if any(tensor.dtype != torch.float32 for tensor in (parts.a, parts.d, parts.dt_bias)):
        return None
    in_proj, out_proj = _payload(parts.in_proj), _payload(parts.out_proj)
    x_proj, dt_proj = _payload(parts.x_proj), _payload(parts.dt_proj)
    is_missing = (parts.x_proj is None) != (x_proj is None)
    is_missing = is_missing or (parts.dt_proj is None) != (dt_proj is None)
    if in_proj is None or out_proj is None or is_missing:
        return None
    return kernels_cpu.FusedMixer(
        dtype,
        in_proj,
        out_proj,
        conv=parts.conv.contiguous(),
        conv_bias=parts.conv_bias,
        a=parts.a.contiguous(),
        d=parts.d.contiguous(),
        dt_bias=parts.dt_bias.contiguous(),
        state_size=parts.state_size,
        num_groups=parts.num_groups,
        x_proj=x_proj,
        dt_proj=dt_proj,
        norm=parts.norm,
        inner_norms=parts.inner_norms,
        eps=parts.eps,
        is_norm_first=parts.is_norm_first,
    )


def delta_of(parts: DeltaMixerParts) -> kernels_cpu.FusedDelta | None:
    """The kernels of a mixer of a gated delta net."""
    dtype = parts.conv.dtype
    is_other = parts.conv_bias is not None and parts.conv_bias.dtype != dtype
    numbers = (parts.a, parts.dt_bias, parts.norm)
    in_proj, out_proj = _payload(parts.in_proj), _payload(parts.out_proj)
    if is_other or any(tensor.dtype != torch.float32 for tensor in numbers):
        return None
    if in_proj is None or out_proj is None:
        return None
    return kernels_cpu.FusedDelta(
        dtype,
        in_proj,
        out_proj,
        conv=parts.conv.contiguous(),
        conv_bias=parts.conv_bias,
        a=parts.a.contiguous(),
        dt_bias=parts.dt_bias.contiguous(),
        norm=parts.norm.contiguous(),
        key_size=parts.key_size,
        eps=parts.eps,
    )


class FusedCpuMixer:
    """A `FusedMixer` by the compiled kernels."""

    __slots__ = ("_mixer",)

    def __init__(self, mixer: kernels_cpu.FusedMixer | kernels_cpu.FusedDelta) -> None:
        self._mixer = mixer

    def __call__(
        self, x: Tensor, pages: tuple[Tensor, Tensor], rounds: Sequence[StatePieces]
    ) -> Tensor:
        return self._mixer.run(x.contiguous(), pages, rounds_of(rounds, len(x)))


def rounds_of(rounds: Sequence[StatePieces], num_tokens: int) -> kernels_cpu.Rounds:
    """The same for the kernels."""
    pieces = [
        kernels_cpu.Pieces(one.begins, one.ends, one.slots.sources, one.slots.targets)
        for one in rounds
    ]
    return kernels_cpu.Rounds(pieces, num_tokens)


def _payload(linear: PackedLinear | None) -> kernels_cpu.PackedWeights | None:
    payload = None if linear is None else linear.payload
    return payload if isinstance(payload, kernels_cpu.PackedWeights) else None
