"""A model of mixers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBackend
from quire.core.interface.backend import Device
from quire.core.interface.fusion import FusedLayers, LayerParts, MixingPlace
from quire.core.interface.op_specs import OP_SPECS
from quire.core.interface.ops import PackedLinear
from quire.core.models.description import ModelDescription
from quire.core.models.state_space.mixers import MixerWeights, make_mixer, scans_in_pages
from quire.core.models.state_space.rounds import cut
from quire.core.models.state_space.spec import StateSpaceSpec
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.pages import PagesPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StateSpaceWeights:
    """All weights, on the device."""

    embedding: Tensor
    norms: Sequence[Tensor]
    """Before each mixer, and the last one: [H] each."""
    mixers: Sequence[MixerWeights]
    lm_head: PackedLinear
    size_bytes: int


class StateSpaceModel:
    """A `LanguageModel` whose layers keep states instead of keys and values."""

    can_be_recorded = True

    def __init__(
        self,
        spec: StateSpaceSpec,
        description: ModelDescription,
        weights: StateSpaceWeights,
        device: Device,
        backends: Sequence[AttentionBackend],
        *,
        max_model_len: int,
    ) -> None:
        self.description = description
        self.attention_groups = description.attention_groups
        self.attention_backends = tuple(backends)
        self.max_model_len = max_model_len
        self.num_parameters = description.num_parameters
        self.weight_bytes = weights.size_bytes
        self._spec = spec
        self._weights = weights
        self._ops = ops = device.ops()
        in_pages = scans_in_pages(device)
        self._mixers = [
            make_mixer(spec, mixer, ops, scans_in_pages=in_pages) for mixer in weights.mixers
        ]
        self._chain = self._make_chain() if in_pages else None

    def forward(self, step: StepContext) -> Tensor:
        """Runs the T tokens of a step; hidden states [T, H], final norm applied.

        Overwrites the states of the blocks in which the step ends.
        """
        plan = step.plans[0]
        assert isinstance(plan, PagesPlan), plan
        rounds = cut(plan)
        residual = self._ops.embedding(step.token_ids, self._weights.embedding)
        dtype = residual.dtype
        if self._spec.keeps_residual_in_float32:
            residual = residual.float()
        if self._chain is not None:
            x = self._norm(residual, self._weights.norms[0], dtype)
            return self._chain(x, residual, [], step.caches, [[one.pieces for one in rounds]])
        for mixer, norm, cache in zip(self._mixers, self._weights.norms, step.caches, strict=False):
            residual = residual + mixer(self._norm(residual, norm, dtype), cache, rounds)
        return self._norm(residual, self._weights.norms[-1], dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, V] of rows [R, H] that `forward` returned."""
        return self._ops.linear(hidden, self._weights.lm_head).float()

    def providers(self) -> dict[str, str]:
        """Who serves each operator."""
        names = [spec.name for spec in OP_SPECS if spec.name in self.description.ops]
        return {name: self._ops.provider(name) for name in names}

    def _make_chain(self) -> FusedLayers | None:
        """The device's one call for all layers, if it has one."""
        fused = [
            self._ops.fuse_layer(
                LayerParts(
                    mixings=[mixer.parts()],
                    mlp=None,
                    mlp_norm=None,
                    following_norm=norm,
                    eps=self._spec.norm_eps,
                    is_residual_wide=self._spec.keeps_residual_in_float32,
                ),
                None,
            )
            for mixer, norm in zip(self._mixers, self._weights.norms[1:], strict=True)
        ]
        known = [one for one in fused if one is not None]
        if len(known) != len(fused):
            return None
        places = [[MixingPlace(cache=index, plan=0)] for index in range(len(known))]
        return self._ops.chain_layers(known, places)

    def _norm(self, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return self._ops.rms_norm(x.to(dtype), weight, self._spec.norm_eps)
