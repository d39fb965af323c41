"""Attention of a layer: from normalised hidden states to heads, through the cache, and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import DecoderSpec


class SelfAttention(Protocol):
    """The attention of one layer, output projection excluded."""

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
    ) -> Tensor:
        """x [T, H] to all heads' values [T, Hq * Dv]. Writes to `cache`; `out` is scratch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadWeights:
    """The weights of attention with keys and values of its own heads."""

    qkv: PackedLinear
    """Query, key and value, stacked."""
    q_norm: Tensor | None
    """[D], or over all heads [Hq * D]."""
    k_norm: Tensor | None
    sinks: Tensor | None
    """float32 [Hq]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentWeights:
    """The weights of attention over a latent, those from the latent to the heads taken apart."""

    q_down: PackedLinear | None
    q_norm: Tensor | None
    q_up: PackedLinear
    kv_down: PackedLinear
    kv_norm: Tensor
    key_up: Tensor
    """[Hq, R, plain]: takes a head's query to the latent."""
    value_up: Tensor
    """[Hq, value, R]: takes the latent to a head's value."""


class HeadAttention:
    """Queries, keys and values by one projection, normalised and rotated."""

    __slots__ = (
        "_attend", "_eps", "_head_counts", "_head_size", "_is_interleaved", "_is_joint", "_k_norm",
        "_linear", "_q_norm", "_qkv", "_rms_norm", "_rotary", "_sinks",
    )  # fmt: skip

    def __init__(
        self, decoder: DecoderSpec, weights: HeadWeights, ops: Ops, attention: AttentionBackend
    ) -> None:
        self._eps = decoder.norm_eps
        self._head_size = decoder.head_size
        self._head_counts = (decoder.num_heads, decoder.num_kv_heads, decoder.num_kv_heads)
        self._is_interleaved = decoder.is_rope_interleaved
        self._is_joint = decoder.is_qk_norm_joint
        self._qkv = weights.qkv
        self._q_norm = weights.q_norm
        self._k_norm = weights.k_norm
        self._sinks = weights.sinks
        # Bound once: a decode step of a small model is mostly Python.
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
        num_tokens = x.shape[0]
        heads = self._linear(x, self._qkv).view(num_tokens, -1, self._head_size)
        q, k, v = heads.split_with_sizes(self._head_counts, 1)
        if self._q_norm is not None and self._k_norm is not None:
            q, k = self._normalised(q, self._q_norm), self._normalised(k, self._k_norm)
        self._rotary(q, k, angles[0], angles[1], is_interleaved=self._is_interleaved)
        if self._sinks is None:
            out = self._attend(q, k, v, cache, plan, out)
        else:
            out = self._attend(q, k, v, cache, plan, out, sinks=self._sinks)
        return out.view(num_tokens, -1)

    def _normalised(self, heads: Tensor, weight: Tensor) -> Tensor:
        if self._is_joint:
            return self._rms_norm(heads.flatten(1), weight, self._eps).view(heads.shape)
        return self._rms_norm(heads, weight, self._eps)


class LatentAttention:
    """The cache keeps the latent alone; queries go to it, and values come from it, a head each.

    Source: DeepSeek-V2 report, section 2.1 and appendix C (absorbed projections).
    """

    def __init__(
        self, decoder: DecoderSpec, weights: LatentWeights, ops: Ops, attention: AttentionBackend
    ) -> None:
        assert decoder.latent is not None
        self._latent = decoder.latent
        self._num_heads = decoder.num_heads
        self._eps = decoder.norm_eps
        self._is_interleaved = decoder.is_rope_interleaved
        self._weights = weights
        self._ops = ops
        self._attend = attention.forward

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
    ) -> Tensor:
        """[T, Hq * value]."""
        ops, latent, weights = self._ops, self._latent, self._weights
        num_tokens = x.shape[0]
        key = ops.linear(x, weights.kv_down)
        key[:, : latent.kv_rank] = ops.rms_norm(
            key[:, : latent.kv_rank].contiguous(), weights.kv_norm, self._eps
        )
        key = key.view(num_tokens, 1, -1)
        heads = self._queries(x).view(num_tokens, self._num_heads, -1)
        plain, rotated = heads.split_with_sizes((latent.plain_size, latent.rotary_size), -1)
        query = torch.cat((ops.head_linear(plain, weights.key_up), rotated), dim=-1)
        ops.rotary(
            query[..., latent.kv_rank :],
            key[..., latent.kv_rank :],
            angles[0],
            angles[1],
            is_interleaved=self._is_interleaved,
        )
        out = self._attend(query, key, key[..., : latent.kv_rank], cache, plan, out)
        return ops.head_linear(out, weights.value_up).view(num_tokens, -1)

    def _queries(self, x: Tensor) -> Tensor:
        weights = self._weights
        if weights.q_down is not None and weights.q_norm is not None:
            x = self._ops.rms_norm(self._ops.linear(x, weights.q_down), weights.q_norm, self._eps)
        return self._ops.linear(x, weights.q_up)
