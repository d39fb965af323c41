"""Attention of a layer: from normalised hidden states to heads, through the cache, and out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.fusion import HeadParts, LatentParts
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

    def parts(self, output: PackedLinear, num_rotated: int) -> HeadParts | LatentParts:
        """The same as a part of a whole layer.

        output: the projection that follows. num_rotated: features of a head that `angles` turn.
        """
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

    def parts(self, output: PackedLinear, num_rotated: int) -> HeadParts:
        """The same as a part of a whole layer."""
        return HeadParts(
            qkv=self._qkv,
            output=output,
            num_heads=self._head_counts[0],
            num_kv_heads=self._head_counts[1],
            head_size=self._head_size,
            num_rotated=num_rotated,
            is_rope_interleaved=self._is_interleaved,
            eps=self._eps,
            q_norm=self._q_norm,
            k_norm=self._k_norm,
            is_qk_norm_joint=self._is_joint,
            sinks=self._sinks,
        )

    def _normalised(self, heads: Tensor, weight: Tensor) -> Tensor:
        if self._is_joint:
            return self._rms_norm(heads.flatten(1), weight, self._eps).view(heads.shape)
        return self._rms_norm(heads, weight, self._eps)
