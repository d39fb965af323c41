"""The layer of a decoder: attention and MLP around a residual, in the operators of a device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.fusion import FusedLayer, FusedLayers, LayerParts, MixingPlace
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.gated_attention import GatedAttention
from quire.core.models.latent_attention import LatentAttention, LatentWeights
from quire.core.models.latent_prompts import MixedPlan, PromptExpansion
from quire.core.models.mixed_rope_attention import MixedRopeAttention
from quire.core.models.mlp import DenseMlp, DenseWeights, MixtureMlp, MixtureWeights, Mlp
from quire.core.models.self_attention import (
    HeadAttention,
    HeadWeights,
    SelfAttention,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """The weights of one layer, on the device. Norms are [H]."""

    input_norm: Tensor
    attention: HeadWeights | LatentWeights
    output: PackedLinear
    attention_output_norm: Tensor | None
    """With sandwich norms."""
    mlp_norm: Tensor
    mlp: DenseWeights | MixtureWeights
    mlp_output_norm: Tensor | None
    """With sandwich norms."""


class DecoderLayer:
    """One layer.

    It takes its input normalised and normalises its output for whoever follows, so that every
    residual sum is fused with the norm after it.
    """

    __slots__ = (
        "_add_rms_norm", "_alone", "_attention", "_attention_output_norm", "_eps",
        "_following_norm", "_fused", "_linear", "_mlp", "_mlp_norm", "_mlp_output_norm", "_output",
        "_rms_norm", "group", "rope",
    )  # fmt: skip

    def __init__(
        self,
        decoder: DecoderSpec,
        weights: LayerWeights,
        following_norm: Tensor,
        *,
        ops: Ops,
        attention: AttentionBackend,
        group: int,
        index: int,
    ) -> None:
        self.group = group
        self.rope = decoder.position_table(index)
        rope = decoder.layer_ropes[index]
        self._eps = decoder.norm_eps
        self._attention = _make_attention(decoder, weights, rope, ops, attention)
        self._mlp = _make_mlp(decoder, weights.mlp, ops)
        self._output = weights.output
        self._attention_output_norm = weights.attention_output_norm
        self._mlp_norm = weights.mlp_norm
        self._mlp_output_norm = weights.mlp_output_norm
        self._following_norm = following_norm
        # Bound once: a decode step of a small model is mostly Python.
        self._linear = ops.linear
        self._rms_norm = ops.rms_norm
        self._add_rms_norm = ops.add_rms_norm
        own = attention.absorbed if isinstance(attention, PromptExpansion) else attention
        num_rotated = 0 if rope is None else decoder.ropes[rope].rotary_size
        self._fused = ops.fuse_layer(self._parts(num_rotated), own)
        self._alone: FusedLayers | None = None
        if self._fused is not None:
            self._alone = ops.chain_layers([self._fused], [[MixingPlace(cache=0, plan=0)]])

    @property
    def fused(self) -> FusedLayer | None:
        """What the device makes of the whole layer, if it does; not for steps of a `MixedPlan`."""
        return self._fused

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
    ) -> Tensor:
        """x [T, H], normalised, to the normalised input [T, H] of what follows.

        angles: (cos, sin), float32 [T, F]. May overwrite x and return it. Adds to `residual`
        [T, H], writes to `cache`, and uses `out` [T, Hq, Dv] of the attention as scratch.
        """
        if self._alone is not None and not isinstance(plan, MixedPlan):
            return self._alone(x, residual, [angles], [cache], [plan])
        x = self._linear(self._attention(x, angles, cache, plan, out), self._output)
        if self._attention_output_norm is not None:
            x = self._rms_norm(x, self._attention_output_norm, self._eps)
        x = self._mlp(self._add_rms_norm(x, residual, self._mlp_norm, self._eps))
        if self._mlp_output_norm is not None:
            x = self._rms_norm(x, self._mlp_output_norm, self._eps)
        return self._add_rms_norm(x, residual, self._following_norm, self._eps)

    def _parts(self, num_rotated: int) -> LayerParts:
        return LayerParts(
            mixings=[self._attention.parts(self._output, num_rotated)],
            mlp=self._mlp.parts(),
            mlp_norm=self._mlp_norm,
            following_norm=self._following_norm,
            eps=self._eps,
            mixing_norm=self._attention_output_norm,
            mlp_output_norm=self._mlp_output_norm,
        )


def _make_attention(
    decoder: DecoderSpec,
    weights: LayerWeights,
    rope: int | None,
    ops: Ops,
    attention: AttentionBackend,
) -> SelfAttention:
    heads = weights.attention
    if isinstance(heads, LatentWeights):
        return LatentAttention(decoder, heads, ops, attention)
    if decoder.has_attention_gate:
        return GatedAttention(decoder, heads, ops, attention)
    if rope is None or decoder.has_rotated_norm:
        # Without weights: as ones, in the dtype of all others.
        norm = weights.input_norm.new_ones(decoder.head_size) if decoder.has_rotated_norm else None
        return MixedRopeAttention(
            decoder, heads, ops, attention, is_rotated=rope is not None, rotated_norm=norm
        )
    return HeadAttention(decoder, heads, ops, attention)


def _make_mlp(decoder: DecoderSpec, weights: DenseWeights | MixtureWeights, ops: Ops) -> Mlp:
    if isinstance(weights, DenseWeights):
        return DenseMlp(decoder.activation, weights, ops)
    assert decoder.mixture is not None
    return MixtureMlp(decoder.mixture, decoder.activation, weights, ops)
