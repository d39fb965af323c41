"""Attention of models that rotate in some of their layers, and in the others do not."""

from __future__ import annotations

from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.fusion import HeadParts
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.self_attention import HeadWeights


class MixedRopeAttention:
    """Heads that are rotated and then normalised, or that know no position but by the mask.

    Source: Kazemnejad et al. 2023 (no positional encoding); the mixture is that of Llama 4.
    """

    __slots__ = (
        "_attend", "_eps", "_head_counts", "_head_size", "_is_interleaved", "_is_rotated",
        "_linear", "_norm", "_qkv", "_rms_norm", "_rotary", "_uses_temperature",
    )  # fmt: skip

    def __init__(
        self,
        decoder: DecoderSpec,
        weights: HeadWeights,
        ops: Ops,
        attention: AttentionBackend,
        *,
        is_rotated: bool,
        rotated_norm: Tensor | None,
    ) -> None:
        """`rotated_norm`: the weight [D] of the norm after rotation; None: there is none."""
        assert weights.q_norm is None, "no family normalises before and after rotation"
        assert weights.sinks is None, "no family has sinks and layers that do not rotate"
        self._eps = decoder.norm_eps
        self._head_size = decoder.head_size
        self._head_counts = (decoder.num_heads, decoder.num_kv_heads, decoder.num_kv_heads)
        self._is_interleaved = decoder.is_rope_interleaved
        self._is_rotated = is_rotated
        self._norm = rotated_norm
        self._uses_temperature = decoder.temperature is not None and not is_rotated
        self._qkv = weights.qkv
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
        """[T, Hq * D]. `angles`: of the layer's rope, or its temperatures."""
        num_tokens = x.shape[0]
        heads = self._linear(x, self._qkv).view(num_tokens, -1, self._head_size)
        q, k, v = heads.split_with_sizes(self._head_counts, 1)
        if self._is_rotated:
            self._rotary(q, k, angles[0], angles[1], is_interleaved=self._is_interleaved)
            if self._norm is not None:
                q = self._rms_norm(q, self._norm, self._eps)
                k = self._rms_norm(k, self._norm, self._eps)
        elif self._uses_temperature:
            # In float32: the factors of long texts lie close to each other.
            q = (q * angles[0].unsqueeze(-1)).to(q.dtype)
        return self._attend(q, k, v, cache, plan, out).view(num_tokens, -1)

    def parts(self, output: PackedLinear, num_rotated: int) -> HeadParts:
        """The same as a part of a whole layer."""
        return HeadParts(
            qkv=self._qkv,
            output=output,
            num_heads=self._head_counts[0],
            num_kv_heads=self._head_counts[1],
            head_size=self._head_size,
            num_rotated=num_rotated if self._is_rotated else 0,
            is_rope_interleaved=self._is_interleaved,
            eps=self._eps,
            rotated_norm=self._norm if self._is_rotated else None,
            has_factors=self._uses_temperature,
        )
