"""The mixer of a gated delta net: projections, a short convolution, and a state of associations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's convention
from torch import Tensor

from quire.core.interface.fusion import DeltaMixerParts
from quire.core.interface.ops import Ops
from quire.core.interface.recurrence import Sequences
from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.state_space.mixers import ConvolvedWeights, Mixer

_EPS = 1e-6
"""Of the lengths of queries and keys, in transformers' own code as in the authors'."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaWeights(ConvolvedWeights):
    """The weights of one mixer, on the device; its first projection gives q, k, v, z, b and a."""

    a: Tensor
    """float32 [M]; negative."""
    dt_bias: Tensor
    """float32 [M]."""
    norm: Tensor
    """float32 [Dv]."""


class DeltaMixer(Mixer):
    """Each head keeps a matrix from keys to values, and forgets what it writes anew."""

    def __init__(
        self, spec: DeltaSpec, weights: DeltaWeights, ops: Ops, *, scans_in_pages: bool
    ) -> None:
        super().__init__(weights, ops, scans_in_pages=scans_in_pages)
        self._spec = spec
        self._weights = weights
        # A vector of length 1 is its RMS norm over sqrt(D), and eps shrinks with the mean.
        size = spec.key_size
        self._length_eps = _EPS / size
        self._k_scale = torch.full_like(weights.norm[:1], size**-0.5).expand(size).contiguous()
        self._q_scale = self._k_scale * size**-0.5
        self._fused = ops.fuse_delta_mixer(self.parts()) if scans_in_pages else None

    def parts(self) -> DeltaMixerParts:
        """The same as a part of a whole layer."""
        spec, weights = self._spec, self._weights
        return DeltaMixerParts(
            in_proj=weights.in_proj,
            out_proj=weights.out_proj,
            conv=weights.conv,
            conv_bias=weights.conv_bias,
            a=weights.a,
            dt_bias=weights.dt_bias,
            norm=weights.norm,
            key_size=spec.key_size,
            eps=spec.norm_eps,
        )

    def _scan(self, projected: Tensor, conv: Tensor, state: Tensor, sequences: Sequences) -> Tensor:
        spec, weights, ops = self._spec, self._weights, self._ops
        mixed, gate, betas, steps = projected.split_with_sizes(spec.projected_sizes, -1)
        # In float32 from here to the gate: lengths of 1 and what the state recalls are not rounded.
        mixed = self._convolve(mixed, conv, sequences).float()
        q, k, v = mixed.split_with_sizes([spec.keys_size, spec.keys_size, spec.values_size], -1)
        y = ops.gated_delta_rule(
            self._unit(q, self._q_scale),
            self._unit(k, self._k_scale),
            v.reshape(len(v), -1, spec.value_size),
            F.softplus(steps.float() + weights.dt_bias).mul_(weights.a),
            torch.sigmoid(betas.float()),
            state,
            sequences,
        )
        normed = ops.rms_norm(y, weights.norm, spec.norm_eps).flatten(1)
        return normed.mul_(F.silu(gate.float())).to(projected.dtype)

    def _unit(self, x: Tensor, scale: Tensor) -> Tensor:
        """The heads of x float32 [T, G * D] as long as `scale` says: [T, G, D]."""
        heads = x.reshape(len(x), -1, self._spec.key_size)
        return self._ops.rms_norm(heads, scale, self._length_eps)
