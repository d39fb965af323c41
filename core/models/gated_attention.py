"""Attention whose result is weighed, number by number, by a gate made of the same input."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.fusion import HeadParts
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.self_attention import HeadWeights


def gates_last(decoder: DecoderSpec, stacked: Tensor) -> Tensor:
    """Rows of [query and gate of each head, keys, values] as [queries, keys, values, gates].

    stacked: [(2 Hq + 2 Hkv) * D, ...]; a copy.
    """
    heads, size = decoder.num_heads, decoder.head_size
    paired, others = stacked[: 2 * heads * size], stacked[2 * heads * size :]
    queries, gates = paired.reshape(heads, 2, size, *stacked.shape[1:]).unbind(1)
    return torch.cat((queries.flatten(0, 1), others, gates.flatten(0, 1)))


class GatedAttention:
    """Queries, keys, values and gates by one projection.

    Source: Qiu et al. 2025 (Gated Attention for Large Language Models), eq. 5.
    """

    __slots__ = (
        "_attend", "_eps", "_head_counts", "_head_size", "_is_interleaved", "_linear", "_rms_norm",
        "_rotary", "_weights",
    )  # fmt: skip

    def __init__(
        self, decoder: DecoderSpec, weights: HeadWeights, ops: Ops, attention: AttentionBackend
    ) -> None:
        """`weights.qkv` has the gates last, as `gates_last` lays them."""
        heads, kv_heads = decoder.num_heads, decoder.num_kv_heads
        self._eps = decoder.norm_eps
        self._head_size = decoder.head_size
        self._head_counts = (heads, kv_heads, kv_heads, heads)
        self._is_interleaved = decoder.is_rope_interleaved
        self._weights = weights
        self._linear = ops.linear
        self._rms_norm = ops.rms_norm
        self._rotary = ops.rotary
        self._attend = attention.forward

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
    ) -> Tensor:
        """[T, Hq * D]."""
        weights, num_tokens = self._weights, x.shape[0]
        heads = self._linear(x, weights.qkv).view(num_tokens, -1, self._head_size)
        q, k, v, gate = heads.split_with_sizes(self._head_counts, 1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = self._rms_norm(q, weights.q_norm, self._eps)
            k = self._rms_norm(k, weights.k_norm, self._eps)
        self._rotary(q, k, angles[0], angles[1], is_interleaved=self._is_interleaved)
        out = self._attend(q, k, v, cache, plan, out)
        return (out * torch.sigmoid(gate)).view(num_tokens, -1)

    def parts(self, output: PackedLinear, num_rotated: int) -> HeadParts:
        """The same as a part of a whole layer."""
        return HeadParts(
            qkv=self._weights.qkv,
            output=output,
            num_heads=self._head_counts[0],
            num_kv_heads=self._head_counts[1],
            head_size=self._head_size,
            num_rotated=num_rotated,
            is_rope_interleaved=self._is_interleaved,
            eps=self._eps,
            q_norm=self._weights.q_norm,
            k_norm=self._weights.k_norm,
            has_gates=True,
        )
