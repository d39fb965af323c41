"""The layer of a decoder: attention and MLP around a residual, in the operators of a device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import DecoderSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerWeights:
    """The weights of one layer, on the device. Norms are [H], or [D] for q and k."""

    input_norm: Tensor
    qkv: PackedLinear
    """Query, key and value, stacked."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: PackedLinear
    attention_output_norm: Tensor | None
    """With sandwich norms."""
    mlp_norm: Tensor
    gate_up: PackedLinear
    """Gate and up, stacked."""
    down: PackedLinear
    mlp_output_norm: Tensor | None
    """With sandwich norms."""


class DecoderLayer:
    """One layer.

    It takes its input normalised and normalises its output for whoever follows, so that every
    residual sum is fused with the norm after it.
    """

    __slots__ = (
        "_activation", "_add_rms_norm", "_attend", "_attention_output_norm", "_down", "_eps",
        "_following_norm", "_gate_up", "_gated_activation", "_head_counts", "_head_size", "_k_norm",
        "_linear", "_mlp_norm", "_mlp_output_norm", "_output", "_q_norm", "_qkv", "_rms_norm",
        "_rotary", "group", "rope",
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
        rope: int,
    ) -> None:
        self.group = group
        self.rope = rope
        self._activation = decoder.activation
        self._eps = decoder.norm_eps
        self._head_size = decoder.head_size
        self._head_counts = (decoder.num_heads, decoder.num_kv_heads, decoder.num_kv_heads)
        self._qkv = weights.qkv
        self._q_norm = weights.q_norm
        self._k_norm = weights.k_norm
        self._output = weights.output
        self._attention_output_norm = weights.attention_output_norm
        self._mlp_norm = weights.mlp_norm
        self._gate_up = weights.gate_up
        self._down = weights.down
        self._mlp_output_norm = weights.mlp_output_norm
        self._following_norm = following_norm
        # Bound once: a decode step of a small model is mostly Python.
        self._linear = ops.linear
        self._rms_norm = ops.rms_norm
        self._add_rms_norm = ops.add_rms_norm
        self._rotary = ops.rotary
        self._gated_activation = ops.gated_activation
        self._attend = attention.forward

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

        angles: (cos, sin), float32 [T, F]. Adds to `residual` [T, H], writes to `cache`, and uses
        `out` [T, Hq, D] as scratch.
        """
        x = self._attention(x, angles, cache, plan, out)
        if self._attention_output_norm is not None:
            x = self._rms_norm(x, self._attention_output_norm, self._eps)
        x = self._add_rms_norm(x, residual, self._mlp_norm, self._eps)
        x = self._gated_activation(self._linear(x, self._gate_up), self._activation)
        x = self._linear(x, self._down)
        if self._mlp_output_norm is not None:
            x = self._rms_norm(x, self._mlp_output_norm, self._eps)
        return self._add_rms_norm(x, residual, self._following_norm, self._eps)

    def _attention(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
    ) -> Tensor:
        num_tokens = x.shape[0]
        heads = self._linear(x, self._qkv).view(num_tokens, -1, self._head_size)
        q, k, v = heads.split_with_sizes(self._head_counts, 1)
        if self._q_norm is not None and self._k_norm is not None:
            q = self._rms_norm(q, self._q_norm, self._eps)
            k = self._rms_norm(k, self._k_norm, self._eps)
        self._rotary(q, k, angles[0], angles[1], is_interleaved=False)
        out = self._attend(q, k, v, cache, plan, out)
        return self._linear(out.view(num_tokens, -1), self._output)
