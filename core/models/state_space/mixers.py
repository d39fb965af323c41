"""The mixers of Mamba and Mamba-2: projections, a short convolution, and a scan with a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - torch's convention
from torch import Tensor

from quire.core.interface.attention import LayerCache
from quire.core.interface.backend import Device
from quire.core.interface.fusion import DeltaMixerParts, FusedMixer, MixerParts
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.interface.recurrence import Sequences
from quire.core.models.state_space.rounds import Round
from quire.core.models.state_space.spec import CONV, STATE, StateSpaceSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConvolvedWeights:
    """The weights that every mixer has, on the device."""

    in_proj: PackedLinear
    conv: Tensor
    """[C, W]."""
    conv_bias: Tensor | None
    out_proj: PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixerWeights(ConvolvedWeights):
    """The weights of one mixer of Mamba or Mamba-2, on the device."""

    a: Tensor
    """float32 [C, N], or [M] of Mamba-2; negative."""
    d: Tensor
    """float32 [C] or [M]."""
    dt_bias: Tensor
    """float32 [C] or [M]."""
    x_proj: PackedLinear | None = None
    """Of Mamba."""
    dt_proj: PackedLinear | None = None
    """Of Mamba."""
    norm: Tensor | None = None
    """[C], of Mamba-2."""
    inner_norms: tuple[Tensor, Tensor, Tensor] | None = None
    """Of the time steps, B and C of Mamba, where they are normalised."""


class Mixer(ABC):
    """x [T, H] to [T, H], with states in pages."""

    def __init__(self, weights: ConvolvedWeights, ops: Ops, *, scans_in_pages: bool) -> None:
        """`scans_in_pages`: the operators take `Sequences.slots`."""
        self._convolved = weights
        self._ops = ops
        self._scans_in_pages = scans_in_pages
        self._fused: FusedMixer | None = None
        """The device's one call, if it has one; a subclass asks for it."""

    def __call__(self, x: Tensor, cache: LayerCache, rounds: Sequence[Round]) -> Tensor:
        """Overwrites the states of the blocks in which pieces of the step end."""
        pages = (cache.tensors[CONV], cache.tensors[STATE])
        if self._fused is not None and pages[0].dtype == x.dtype:
            return self._fused(x, pages, [piece.pieces for piece in rounds])
        projected = self._ops.linear(x, self._convolved.in_proj)
        in_pages = self._scans_in_pages and pages[0].dtype == projected.dtype
        out = None
        for piece in rounds:
            rows = projected if piece.rows is None else projected.index_select(0, piece.rows)
            part = piece.scan(pages, partial(self._scan_states, rows), in_pages=in_pages)
            if piece.rows is None:
                out = part
            else:
                out = part.new_zeros((len(x), part.shape[1])) if out is None else out
                out.index_copy_(0, piece.rows, part)
        assert out is not None, "a step without tokens"
        return self._ops.linear(out, self._convolved.out_proj)

    def _scan_states(
        self, projected: Tensor, states: Sequence[Tensor], sequences: Sequences
    ) -> Tensor:
        return self._scan(projected, states[0], states[1], sequences)

    @abstractmethod
    def parts(self) -> MixerParts | DeltaMixerParts:
        """The same as a part of a whole layer."""

    @abstractmethod
    def _scan(self, projected: Tensor, conv: Tensor, state: Tensor, sequences: Sequences) -> Tensor:
        """Rows [n, C] for the last projection; overwrites the states of the sequences."""

    def _convolve(self, x: Tensor, conv: Tensor, sequences: Sequences) -> Tensor:
        weights = self._convolved
        return self._ops.causal_conv1d(
            x.contiguous(), weights.conv, weights.conv_bias, conv, sequences, activation="silu"
        )


class _StateSpaceMixer(Mixer):
    """What Mamba and Mamba-2 share."""

    def __init__(
        self, spec: StateSpaceSpec, weights: MixerWeights, ops: Ops, *, scans_in_pages: bool
    ) -> None:
        super().__init__(weights, ops, scans_in_pages=scans_in_pages)
        self._spec = spec
        self._weights = weights
        self._fused = ops.fuse_mixer(self.parts()) if scans_in_pages else None

    def parts(self) -> MixerParts:
        """The same as a part of a whole layer."""
        spec, weights = self._spec, self._weights
        return MixerParts(
            in_proj=weights.in_proj,
            out_proj=weights.out_proj,
            conv=weights.conv,
            conv_bias=weights.conv_bias,
            a=weights.a,
            d=weights.d,
            dt_bias=weights.dt_bias,
            state_size=spec.state_size,
            num_groups=spec.num_groups,
            eps=spec.norm_eps,
            x_proj=weights.x_proj,
            dt_proj=weights.dt_proj,
            inner_norms=weights.inner_norms,
            norm=weights.norm,
            is_norm_first=spec.is_norm_before_gate,
        )


class MambaMixer(_StateSpaceMixer):
    """Each channel has a decay of its own for each number of its state."""

    def _scan(self, projected: Tensor, conv: Tensor, state: Tensor, sequences: Sequences) -> Tensor:
        spec, weights, ops = self._spec, self._weights, self._ops
        assert weights.x_proj is not None
        assert weights.dt_proj is not None
        x, gate = projected.chunk(2, dim=-1)
        x = self._convolve(x, conv, sequences)
        sizes = [spec.rank, spec.state_size, spec.state_size]
        steps, b, c = (
            part.contiguous() for part in ops.linear(x, weights.x_proj).split_with_sizes(sizes, -1)
        )
        if weights.inner_norms is not None:
            steps, b, c = (
                ops.rms_norm(part, norm, spec.norm_eps)
                for part, norm in zip((steps, b, c), weights.inner_norms, strict=True)
            )
        dt = F.softplus(ops.linear(steps, weights.dt_proj).float() + weights.dt_bias)
        y = ops.selective_scan(x, dt, weights.a, b, c, weights.d, state, sequences)
        return y * F.silu(gate)


class Mamba2Mixer(_StateSpaceMixer):
    """A head has one decay, and the convolution covers B and C as well."""

    def _scan(self, projected: Tensor, conv: Tensor, state: Tensor, sequences: Sequences) -> Tensor:
        spec, weights = self._spec, self._weights
        heads, groups, size = spec.num_heads or 1, spec.num_groups, spec.state_size
        gate, mixed, dt = projected.split_with_sizes(
            [spec.inner_size, spec.conv_size, heads], dim=-1
        )
        mixed = self._convolve(mixed, conv, sequences)
        x, b, c = mixed.split_with_sizes([spec.inner_size, groups * size, groups * size], dim=-1)
        steps = F.softplus(dt.float() + weights.dt_bias)
        y = self._ops.ssd_scan(
            x.reshape(len(x), heads, -1),
            steps,
            weights.a,
            b.reshape(len(x), groups, size),
            c.reshape(len(x), groups, size),
            weights.d,
            state,
            sequences,
        )
        return self._norm(y.reshape(len(x), -1), gate)

    def _norm(self, y: Tensor, gate: Tensor) -> Tensor:
        """The gated channels, with the RMS norm of each group after the gate or before it."""
        weight, opening = self._weights.norm, F.silu(gate.float())
        if weight is None:
            return (y.float() * opening).to(y.dtype)
        if self._spec.is_norm_before_gate:
            return (weight * self._normed_groups(y.float()) * opening).to(y.dtype)
        return self._normed_groups(y.float() * opening).to(y.dtype) * weight

    def _normed_groups(self, x: Tensor) -> Tensor:
        groups = x.view(len(x), self._spec.num_groups, -1)
        variance = groups.square().mean(-1, keepdim=True)
        return (groups * torch.rsqrt(variance + self._spec.norm_eps)).view(x.shape)


def scans_in_pages(device: Device) -> bool:
    """Whether the operators of a device take `Sequences.slots`."""
    return "state_slots" in device.capabilities.features


def make_mixer(
    spec: StateSpaceSpec, weights: MixerWeights, ops: Ops, *, scans_in_pages: bool
) -> Mixer:
    """The mixer that a spec asks for."""
    kind = MambaMixer if spec.num_heads is None else Mamba2Mixer
    return kind(spec, weights, ops, scans_in_pages=scans_in_pages)
