"""Attention of a layer whose cache holds one latent for all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBackend, AttentionPlan, LayerCache
from quire.core.interface.fusion import LatentParts
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.latent_prompts import ExpandedStep, MixedPlan, PromptExpansion, pieces_of


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
    heads_up: tuple[PackedLinear, ...]
    """The two once more, for prompts: of each group of heads, from the latent [R] to their plain
    keys and values [heads * (plain + value)]. Empty: prompts are computed as tokens are."""


class LatentAttention:
    """The cache keeps the latent alone; queries go to it, and values come from it, a head each.

    Prompts that are worth it get keys and values of every head's own.
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
        self._attention = attention

    def __call__(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
    ) -> Tensor:
        """[T, Hq * value]."""
        ops, rank = self._ops, self._latent.kv_rank
        key = ops.linear(x, self._weights.kv_down)
        key[:, :rank] = ops.rms_norm(key[:, :rank].contiguous(), self._weights.kv_norm, self._eps)
        key = key.view(len(x), 1, -1)
        query = self._queries(x).view(len(x), self._num_heads, -1)
        ops.rotary(
            query[..., self._latent.plain_size :],
            key[..., rank:],
            angles[0],
            angles[1],
            is_interleaved=self._is_interleaved,
        )
        if isinstance(plan, MixedPlan):
            return self._mixed(query, key, cache, plan, out).view(len(x), -1)
        return self._absorbed(query, key, cache, plan, out).view(len(x), -1)

    def parts(self, output: PackedLinear, num_rotated: int) -> LatentParts:
        """The same as a part of a whole layer, for steps that are absorbed."""
        weights = self._weights
        return LatentParts(
            q_down=weights.q_down,
            q_norm=weights.q_norm,
            q_up=weights.q_up,
            kv_down=weights.kv_down,
            kv_norm=weights.kv_norm,
            key_up=weights.key_up,
            value_up=weights.value_up,
            output=output,
            num_rotated=num_rotated,
            is_rope_interleaved=self._is_interleaved,
            eps=self._eps,
        )

    def _queries(self, x: Tensor) -> Tensor:
        weights = self._weights
        if weights.q_down is not None and weights.q_norm is not None:
            x = self._ops.rms_norm(self._ops.linear(x, weights.q_down), weights.q_norm, self._eps)
        return self._ops.linear(x, weights.q_up)

    def _absorbed(
        self, query: Tensor, key: Tensor, cache: LayerCache, plan: AttentionPlan, out: Tensor
    ) -> Tensor:
        """query [T, Hq, plain + P], key [T, 1, R + P], out [T, Hq, R] to values [T, Hq, value]."""
        latent, ops = self._latent, self._ops
        plain, rotated = query.split_with_sizes((latent.plain_size, latent.rotary_size), -1)
        query = torch.cat((ops.head_linear(plain, self._weights.key_up), rotated), dim=-1)
        out = self._attention.forward(query, key, key[..., : latent.kv_rank], cache, plan, out)
        return ops.head_linear(out, self._weights.value_up)

    def _mixed(
        self, query: Tensor, key: Tensor, cache: LayerCache, plan: MixedPlan, out: Tensor
    ) -> Tensor:
        """As `_absorbed`, some requests expanded, perhaps all."""
        rows = plan.expanded.rows
        if rows is None:
            return self._expanded(query, key, cache, plan.expanded)
        values = query.new_zeros((*query.shape[:2], self._latent.value_size))
        parts = query.index_select(0, rows), key.index_select(0, rows)
        values.index_copy_(0, rows, self._expanded(*parts, cache, plan.expanded))
        if plan.absorbed is not None:
            rows = plan.absorbed.rows
            parts = query.index_select(0, rows), key.index_select(0, rows)
            rest = self._absorbed(*parts, cache, plan.absorbed.plan, out[: len(rows)])
            values.index_copy_(0, rows, rest)
        return values

    def _expanded(
        self, query: Tensor, key: Tensor, cache: LayerCache, step: ExpandedStep
    ) -> Tensor:
        """query [n, Hq, plain + P] and key [n, 1, R + P] to values [n, Hq, value]."""
        attention, spec = self._attention, self._attention.spec
        assert isinstance(attention, PromptExpansion)
        attention.write(key, key[..., : self._latent.kv_rank], cache, step.slots)
        if spec.cache_dtype != spec.dtype:  # attention sees what is stored
            key = attention.read_keys(cache, step.slots)
        heads, scratch = attention.heads, attention.scratch
        count = heads.spec.num_heads
        values = query.new_empty((*query.shape[:2], self._latent.value_size))
        for index, weights in enumerate(self._weights.heads_up):
            for slots, targets in pieces_of(step.prefix_slots, step.prefix_targets):
                before = attention.read_keys(cache, slots)
                heads.write(*self._of_heads(before, weights, count), scratch, targets)
            part = slice(index * count, (index + 1) * count)
            whole = len(self._weights.heads_up) == 1
            out = values if whole else values[:, part].contiguous()
            k, v = self._of_heads(key, weights, count)
            heads.forward(query[:, part], k, v, scratch, step.plan, out)
            if not whole:
                values[:, part] = out
        return values

    def _of_heads(self, key: Tensor, weights: PackedLinear, count: int) -> tuple[Tensor, Tensor]:
        """Keys [n, heads, plain + P] and values [n, heads, value] of latents [n, 1, R + P]."""
        latent = self._latent
        made = self._ops.linear(key[:, 0, : latent.kv_rank].contiguous(), weights)
        plain, v = made.view(len(key), count, -1).split_with_sizes(
            (latent.plain_size, latent.value_size), -1
        )
        rotated = key[..., latent.kv_rank :].expand(-1, count, -1)
        return torch.cat((plain, rotated), dim=-1), v
