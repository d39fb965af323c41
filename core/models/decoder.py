"""A decoder-only language model: every family runs through this one class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.core.errors import Reason, UnsupportedError
from quire.core.interface.attention import AttentionBackend
from quire.core.interface.backend import Device
from quire.core.interface.fusion import FusedLayers, MixingPlace
from quire.core.interface.op_specs import OP_SPECS
from quire.core.interface.ops import PackedLinear
from quire.core.models.description import ModelDescription
from quire.core.models.latent_prompts import MixedPlan
from quire.core.models.layers import DecoderLayer, LayerWeights
from quire.core.models.rotary import make_position_tables
from quire.core.models.step_context import StepContext


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderWeights:
    """All weights of a decoder, on the device."""

    embedding: Tensor
    """[V, H]."""
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    """[H]."""
    lm_head: PackedLinear
    size_bytes: int
    """Memory that all of them hold, as packed."""


class CausalLM:
    """A loaded model on one device.

    The caller plans each group (`attention_backends[g].plan(batch)`), calls `forward` with the
    plans, and `logits` with the rows to sample.
    """

    def __init__(
        self,
        description: ModelDescription,
        weights: DecoderWeights,
        device: Device,
        attention_backends: Sequence[AttentionBackend],
        *,
        max_model_len: int,
    ) -> None:
        decoder = description.decoder
        assert decoder is not None, f"{description.architecture} has no native decoder"
        self.description = description
        self.attention_groups = description.attention_groups
        self.attention_backends = tuple(attention_backends)
        self.max_model_len = max_model_len
        self.num_parameters = description.num_parameters
        self.can_be_recorded = True
        self._ops = device.ops()
        self._decoder = decoder
        self._embedding = weights.embedding
        # In the model's dtype, as in training: bfloat16 makes 55.5 of sqrt(3072).
        self._embedding_scale = float(weights.embedding.new_tensor(decoder.embedding_scale))
        self._first_norm = weights.layers[0].input_norm
        self._lm_head = weights.lm_head
        self._ropes = make_position_tables(
            decoder, max_model_len=max_model_len, device=str(device.torch_device)
        )
        self.weight_bytes = weights.size_bytes + sum(rope.size_bytes for rope in self._ropes)
        self._layers = self._make_layers(weights)
        self._chain = self._make_chain()
        latent = decoder.latent
        value_size = latent.kv_rank if latent else decoder.head_size
        self._attended_shape = (decoder.num_heads, value_size)

    def forward(self, step: StepContext) -> Tensor:
        """Runs the T tokens of a step. Returns hidden states [T, H], final norm applied.

        Writes the step's keys and values to `step.caches`.
        """
        decoder = self._decoder
        residual = self._ops.embedding(step.token_ids, self._embedding)
        if self._embedding_scale != 1.0:
            residual *= self._embedding_scale
        angles = [rope.gather(step.positions) for rope in self._ropes]
        # One buffer for all layers: each consumes it before the next one starts.
        out = residual.new_empty((residual.shape[0], *self._attended_shape))
        x = self._ops.rms_norm(residual, self._first_norm, decoder.norm_eps)
        plans = step.plans
        if self._chain is not None and not any(isinstance(plan, MixedPlan) for plan in plans):
            return self._chain(x, residual, angles, step.caches, plans)
        for layer, cache in zip(self._layers, step.caches, strict=True):
            x = layer.forward(x, residual, angles[layer.rope], cache, plans[layer.group], out)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, V] of hidden states [R, H] that `forward` returned."""
        logits = self._ops.linear(hidden, self._lm_head).float()
        if self._decoder.logit_soft_cap is not None:
            self._ops.soft_cap(logits, self._decoder.logit_soft_cap)
        return logits

    def providers(self) -> dict[str, str]:
        """Who serves each operator; attention of several groups is listed by group."""
        names = [spec.name for spec in OP_SPECS if spec.name in self.description.ops]
        serving = {op: self._ops.provider(op) for op in names if op != "paged_attention"}
        by_group = {
            group.name: backend.provider()
            for group, backend in zip(self.attention_groups, self.attention_backends, strict=True)
        }
        if len(set(by_group.values())) == 1:
            return {**serving, "paged_attention": next(iter(by_group.values()))}
        return {**serving, **{f"paged_attention[{name}]": who for name, who in by_group.items()}}

    def _make_chain(self) -> FusedLayers | None:
        """The device's one call for all layers, if it has one."""
        fused = [layer.fused for layer in self._layers]
        known = [one for one in fused if one is not None]
        if len(known) != len(fused):
            return None
        places = [
            [MixingPlace(cache=index, plan=layer.group, angles=layer.rope)]
            for index, layer in enumerate(self._layers)
        ]
        return self._ops.chain_layers(known, places)

    def _make_layers(self, weights: DecoderWeights) -> list[DecoderLayer]:
        group_of = {
            layer: index
            for index, group in enumerate(self.attention_groups)
            for layer in group.layers
        }
        following = [layer.input_norm for layer in weights.layers[1:]] + [weights.final_norm]
        return [
            DecoderLayer(
                self._decoder,
                layer_weights,
                following[index],
                ops=self._ops,
                attention=self.attention_backends[group_of[index]],
                group=group_of[index],
                index=index,
            )
            for index, layer_weights in enumerate(weights.layers)
        ]


def make_attention_backends(
    description: ModelDescription, device: Device
) -> list[AttentionBackend]:
    """The attention of each group.

    Raises: UnsupportedError with the reasons of all groups.
    """
    backends: list[AttentionBackend] = []
    reasons: list[Reason] = []
    for group in description.attention_groups:
        try:
            backends.append(device.attention(group.spec))
        except UnsupportedError as error:
            reasons.extend(error.reasons)
    if reasons:
        raise UnsupportedError(reasons, what=f"the attention of {description.architecture}")
    return backends
