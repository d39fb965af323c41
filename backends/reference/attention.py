"""Paged attention in plain torch, on any torch device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from quire.backends.reference.attention_plan import QueryGroup, ReferencePlan, make_plan
from quire.backends.reference.cache_codec import NARROW, CacheCodec, as_bits
from quire.core.interface import (
    AttentionBackend,
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
    CacheLayout,
    DeviceOutOfMemory,
    LayerCache,
    Reason,
)

_KINDS = ("causal", "sliding_window", "chunked", "mla")
_MAX_SCORES = 1 << 24
"""Scores held at a time where they are written down: 64 MiB."""


class ReferenceAttention(AttentionBackend):
    """Keys in `k` [N, B, Hk, D], values in `v` [N, B, Hk, Dv]; computes in float32.

    `mla` keeps `k` alone: the latent [N, B, 1, D].
    """

    def __init__(self, spec: AttentionSpec, torch_device: str = "cpu") -> None:
        self.spec = spec
        self._torch_device = torch_device
        self._codec = CacheCodec(spec.cache_dtype)
        self._compute_dtype = torch.float64 if spec.dtype == "float64" else torch.float32

    def provider(self) -> str:
        return "reference"

    @classmethod
    def reasons_against(cls, spec: AttentionSpec) -> list[Reason]:
        reasons = []
        if spec.kind not in _KINDS:
            reasons.append(_reason("kind", spec.kind, ", ".join(_KINDS), "use another device"))
        elif spec.kind in ("sliding_window", "chunked") and not spec.window:
            reasons.append(_reason("window", "a window", "none in the spec", "give a window"))
        if spec.kind == "mla" and (spec.num_kv_heads != 1 or spec.v_head_size > spec.head_size):
            need = (
                f"{spec.num_kv_heads} key heads of {spec.head_size}, values of {spec.v_head_size}"
            )
            have = "one latent head, whose first features are the values"
            reasons.append(_reason("mla", need, have, "absorb the value projection"))
        if spec.num_heads % spec.num_kv_heads:
            need = f"{spec.num_heads} heads over {spec.num_kv_heads} key heads"
            reasons.append(
                _reason("heads", need, "whole groups of heads", "check the model's configuration")
            )
        reasons += [
            _reason("dtype", name, "torch's floating dtypes", "choose another dtype")
            for name in {spec.dtype, spec.cache_dtype}
            if not _is_float(name) and (name == spec.dtype or name not in NARROW)
        ]
        return reasons

    # --- cache ----------------------------------------------------------------------------------

    def cache_layout(self) -> CacheLayout:
        spec = self.spec
        k = (spec.block_size, spec.num_kv_heads, spec.head_size)
        parts = [("k", k)]
        if spec.kind != "mla":
            parts.append(("v", (spec.block_size, spec.num_kv_heads, spec.v_head_size)))
        tensors = tuple(tensor for part in parts for tensor in self._codec.layout(*part))
        sizes = (prod(t.block_shape) * getattr(torch, t.dtype).itemsize for t in tensors)
        names = ", ".join(tensor.name for tensor in tensors)
        return CacheLayout(
            tensors=tensors,
            bytes_per_block=sum(sizes),
            description=f"{names} [blocks, {', '.join(map(str, k))}] {spec.cache_dtype}",
        )

    def allocate(self, num_blocks: int) -> LayerCache:
        layout = self.cache_layout()
        try:
            tensors = {
                tensor.name: torch.empty(
                    (num_blocks, *tensor.block_shape),
                    dtype=getattr(torch, tensor.dtype),
                    device=self._torch_device,
                )
                for tensor in layout.tensors
            }
        except torch.AcceleratorError:  # the device failed; memory was not short
            raise
        except (
            RuntimeError
        ) as error:  # torch.OutOfMemoryError is one; the host's allocator raises it bare
            raise DeviceOutOfMemory(
                f"one layer's {num_blocks} blocks of {layout.bytes_per_block} bytes do not fit on "
                f"{self._torch_device}: {error}; lower device_memory_fraction or "
                "cache_memory_bytes, or free the device of other processes",
                requested_bytes=num_blocks * layout.bytes_per_block,
                tag="cache",
            ) from error
        return LayerCache(tensors=tensors, block_size=self.spec.block_size)

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        for name, new in (("k", k), ("v", v)):
            if name in cache.tensors:
                self._codec.write(cache.tensors, name, slot_mapping, new)

    def read_keys(self, cache: LayerCache, slots: Tensor) -> Tensor:
        spec = self.spec
        heads = torch.arange(spec.num_kv_heads, device=slots.device)
        rows = (slots.unsqueeze(-1) * spec.num_kv_heads + heads).flatten()
        wide = self._codec.read(cache.tensors, "k", rows, self._compute_dtype)
        return wide.view(len(slots), spec.num_kv_heads, -1).to(getattr(torch, spec.dtype))

    def copy_blocks(self, cache: LayerCache, source: Sequence[int], target: Sequence[int]) -> None:
        from_ids, to_ids = self._index(source), self._index(target)
        for tensor in map(as_bits, cache.tensors.values()):
            tensor.index_copy_(0, to_ids, tensor.index_select(0, from_ids))

    def export_blocks(self, cache: LayerCache, block_ids: Sequence[int]) -> Tensor:
        spec = self.spec
        shape = (len(block_ids), spec.block_size, spec.num_kv_heads, -1)
        rows = self._rows(block_ids, spec.block_size * spec.num_kv_heads)
        parts = [
            self._codec.read(cache.tensors, name, rows, torch.float32).view(shape)
            for name in ("k", "v")
            if name in cache.tensors
        ]
        return torch.cat(parts, dim=-1).cpu()

    def import_blocks(self, cache: LayerCache, block_ids: Sequence[int], blocks: Tensor) -> None:
        names = [name for name in ("k", "v") if name in cache.tensors]
        slots = self._rows(block_ids, self.spec.block_size)
        parts = torch.split(blocks, [cache.tensors[name].shape[-1] for name in names], dim=-1)
        for name, part in zip(names, parts, strict=True):
            new = part.to(self._torch_device).flatten(0, 1)
            self._codec.write(cache.tensors, name, slots, new)

    def _rows(self, block_ids: Sequence[int], per_block: int) -> Tensor:
        """The rows of whole blocks, where a block has so many: int64 [n * per_block]."""
        offsets = torch.arange(per_block, device=self._torch_device)
        return (self._index(block_ids).unsqueeze(-1) * per_block + offsets).flatten()

    def _index(self, block_ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(block_ids), dtype=torch.int64, device=self._torch_device)

    # --- attention ------------------------------------------------------------------------------

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        return make_plan(self.spec, batch)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(plan, ReferencePlan), plan
        self.write(k, v, cache, plan.slot_mapping)
        for group in plan.groups:
            self._attend(q, cache, group, out, sinks, alibi_slopes)
        out[plan.num_tokens :] = 0
        return out

    def _attend(
        self,
        q: Tensor,
        cache: LayerCache,
        group: QueryGroup,
        out: Tensor,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> None:
        """Attention of one group of requests: reads its rows of q, writes those of `out`."""
        spec = self.spec
        n, num_queries, Hk = group.num_requests, group.num_queries, spec.num_kv_heads
        heads = (n, num_queries, Hk, spec.num_heads // Hk)
        # [n, Hk, G, Q, D] and [n, Hk, S, D]
        queries = q[group.rows].view(*heads, spec.head_size).permute(0, 2, 3, 1, 4)
        queries = queries.to(self._compute_dtype)
        keys = self._gather(cache, "k", group)
        has_values = "v" in cache.tensors
        values = self._gather(cache, "v", group) if has_values else keys[..., : spec.v_head_size]
        is_plain = spec.soft_cap is None and sinks is None and alibi_slopes is None
        if is_plain and num_queries > 1:
            result = self._fused(queries, keys, values, group)
        else:
            parts = [
                self._explicit(part, keys, values, part_of_group, sinks, alibi_slopes)
                for part, part_of_group in _row_parts(queries, group, keys.shape[-2])
            ]
            result = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
        result = result.permute(0, 3, 1, 2, 4).reshape(n * num_queries, spec.num_heads, -1)
        out[group.rows] = result.to(out.dtype)

    def _gather(self, cache: LayerCache, name: str, group: QueryGroup) -> Tensor:
        """The context of a group from one cache tensor, in float32: [n, Hk, S, D]."""
        wide = self._codec.read(cache.tensors, name, group.gather, self._compute_dtype)
        return wide.view(group.num_requests, self.spec.num_kv_heads, -1, wide.shape[-1])

    def _fused(self, queries: Tensor, keys: Tensor, values: Tensor, group: QueryGroup) -> Tensor:
        """The fused kernel for one request; a key head is a batch entry, so no key is repeated."""
        shape = (-1, queries.shape[2], -1, -1)  # [Hk, G, S, D], the same memory for all G
        bias = None if group.bias is None else group.bias[0, 0, 0].to(queries.dtype)
        return F.scaled_dot_product_attention(
            queries[0],
            keys[0].unsqueeze(1).expand(shape),
            values[0].unsqueeze(1).expand(shape),
            attn_mask=bias,
            is_causal=group.is_causal,
            scale=self.spec.scale,
        ).unsqueeze(0)

    def _explicit(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        group: QueryGroup,
        sinks: Tensor | None,
        alibi_slopes: Tensor | None,
    ) -> Tensor:
        """softmax(scale * q k^T + ...) v, written down: [n, Hk, G, Q, Dv]."""
        n, Hk, G, Q, _ = queries.shape
        scores = queries.reshape(n, Hk, G * Q, -1) @ keys.mT
        scores = scores.mul_(self.spec.scale).view(n, Hk, G, Q, -1)
        if self.spec.soft_cap is not None:
            scores.div_(self.spec.soft_cap).tanh_().mul_(self.spec.soft_cap)
        if alibi_slopes is not None:
            assert group.distance is not None, "alibi_slopes for a spec without has_alibi"
            scores.sub_(alibi_slopes.view(1, Hk, G, 1, 1) * group.distance)
        if group.bias is not None:
            scores.add_(group.bias)
        weights = _softmax(scores, sinks).view(n, Hk, G * Q, -1)
        return (weights @ values).view(n, Hk, G, Q, -1)


def _reason(what: str, need: str, have: str, remedy: str) -> Reason:
    return Reason(code=f"attention.{what}", need=need, have=have, remedy=remedy)


def _is_float(name: str) -> bool:
    dtype = getattr(torch, name, None)
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last of [n, Hk, G, Q, S]; a sink [Hq] takes its share and gives nothing."""
    if sinks is None:
        return scores.softmax(-1)
    sink = sinks.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1)
    with_sink = torch.cat((scores, sink.expand(*scores.shape[:-1], 1)), dim=-1)
    return with_sink.softmax(-1)[..., :-1]


def _row_parts(
    queries: Tensor, group: QueryGroup, context: int
) -> Iterator[tuple[Tensor, QueryGroup]]:
    """The queries [n, Hk, G, Q, D] in parts whose scores fit into memory, and their masks."""
    n, Hk, G, Q, _ = queries.shape
    if Q == 1:
        yield queries, group
        return
    step = max(1, _MAX_SCORES // (n * Hk * G * context))
    bias = _causal_bias(Q, queries) if group.is_causal else group.bias
    for begin in range(0, Q, step):
        part = slice(begin, begin + step)
        yield (
            queries[:, :, :, part],
            replace(
                group,
                bias=None if bias is None else bias[..., part, :],
                distance=None if group.distance is None else group.distance[..., part, :],
            ),
        )


def _causal_bias(length: int, like: Tensor) -> Tensor:
    return torch.full((length, length), float("-inf"), device=like.device).triu_(1)
