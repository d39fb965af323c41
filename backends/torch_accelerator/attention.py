"""Paged attention by Triton's kernels, in the cache layout of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quire.backends.reference import ReferenceAttention
from quire.core.interface import (
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
    CacheLayout,
    CacheTensor,
    LayerCache,
    Reason,
)
from quire.kernels_triton.attention import (
    AttentionShape,
    PagedCache,
    PagedStep,
    choose_splits,
    make_partials,
    paged_attention,
)
from quire.kernels_triton.cache import copy_blocks, write_cache
from quire.kernels_triton.launch import Launcher

_MAX_HEAD_SIZE = 256
_SCALES = (("k", "k_scale"), ("v", "v_scale"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TritonPlan(AttentionPlan):
    """The step as the kernels read it. Lengths are taken from the device, so it can be replayed."""

    step: PagedStep
    slot_mapping: Tensor
    num_tokens: int
    """Rows that belong to a request; those after them are padding."""


class TritonAttention(ReferenceAttention):
    """Keys in `k` [N, B, Hk, D], values in `v` [N, B, Hk, Dv].

    In a cache of 8-bit floats each (token, head) has a scale, in `k_scale` and `v_scale` float32
    [N, B, Hk].
    """

    def __init__(self, spec: AttentionSpec, torch_device: str, launcher: Launcher) -> None:
        super().__init__(spec, torch_device)
        self._launcher = launcher
        self._has_scales = spec.cache_dtype.startswith("float8")
        self._shape = AttentionShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            v_head_size=spec.v_head_size,
            block_size=spec.block_size,
            scale=spec.scale,
            window=(spec.window or 0) if spec.kind == "sliding_window" else 0,
            chunk=(spec.window or 0) if spec.kind == "chunked" else 0,
            soft_cap=spec.soft_cap or 0.0,
        )

    def provider(self) -> str:
        return f"triton:{self._launcher.table.architecture}"

    @classmethod
    def reasons_against(cls, spec: AttentionSpec) -> list[Reason]:
        reasons = super().reasons_against(spec)
        for name, size in (("head_size", spec.head_size), ("v_head_size", spec.v_head_size)):
            if size > _MAX_HEAD_SIZE:
                reasons.append(
                    Reason(
                        code=f"attention.{name}",
                        need=f"heads of {size}",
                        have=f"kernels for heads up to {_MAX_HEAD_SIZE}",
                        remedy="use another device",
                    )
                )
        return reasons

    # --- cache ----------------------------------------------------------------------------------

    def cache_layout(self) -> CacheLayout:
        layout = super().cache_layout()
        if not self._has_scales:
            return layout
        shape = (self.spec.block_size, self.spec.num_kv_heads)
        scales = tuple(
            CacheTensor(name=name, block_shape=shape, dtype="float32") for _, name in _SCALES
        )
        return replace(
            layout,
            tensors=layout.tensors + scales,
            bytes_per_block=layout.bytes_per_block + 2 * 4 * shape[0] * shape[1],
            description=f"{layout.description}, a float32 scale a token and head",
        )

    def allocate(self, num_blocks: int) -> LayerCache:
        cache = super().allocate(num_blocks)
        for _, name in _SCALES:
            if name in cache.tensors:
                cache.tensors[name] = torch.empty(
                    cache.tensors[name].shape, dtype=torch.float32, device=self._torch_device
                )
        return cache

    def copy_blocks(self, cache: LayerCache, source: Sequence[int], target: Sequence[int]) -> None:
        from_ids, to_ids = self._index(source), self._index(target)
        for tensor in cache.tensors.values():
            copy_blocks(self._launcher, tensor, from_ids, to_ids)

    def export_blocks(self, cache: LayerCache, block_ids: Sequence[int]) -> Tensor:
        if not self._has_scales:
            return super().export_blocks(cache, block_ids)
        index = self._index(block_ids)
        parts = [
            cache.tensors[name]
            .view(torch.uint8)
            .index_select(0, index)
            .view(getattr(torch, self.spec.cache_dtype))
            .float()
            * cache.tensors[scale].index_select(0, index).unsqueeze(-1)
            for name, scale in _SCALES
        ]
        return torch.cat(parts, dim=-1).cpu()

    def import_blocks(self, cache: LayerCache, block_ids: Sequence[int], blocks: Tensor) -> None:
        if not self._has_scales:
            super().import_blocks(cache, block_ids, blocks)
            return
        spec = self.spec
        rows = blocks.to(device=self._torch_device, dtype=getattr(torch, spec.dtype)).flatten(0, 1)
        first = self._index(block_ids).unsqueeze(-1) * spec.block_size
        slots = (first + torch.arange(spec.block_size, device=self._torch_device)).flatten()
        k, v = torch.split(rows, [spec.head_size, spec.v_head_size], dim=-1)
        write_cache(self._launcher, k, v, _paged(cache), slots)

    # --- attention ------------------------------------------------------------------------------

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        starts, num_requests = batch.query_start_loc_host, batch.num_requests
        counts = [starts[r + 1] - starts[r] for r in range(num_requests)]
        has_decodes, has_prefills = 1 in counts, max(counts, default=0) > 1
        num_splits = 1
        if has_decodes:
            num_splits = choose_splits(
                self._launcher,
                num_requests=num_requests,
                num_kv_heads=self.spec.num_kv_heads,
                max_seq_len=batch.max_seq_len,
            )
        partial, partial_log = make_partials(
            self._shape,
            num_requests=num_requests,
            num_splits=num_splits,
            device=torch.device(self._torch_device),
        )
        step = PagedStep(
            query_start_loc=batch.query_start_loc[: num_requests + 1],
            seq_lens=batch.seq_lens[:num_requests],
            block_table=batch.block_table[:num_requests],
            num_tokens=starts[num_requests],
            has_decodes=has_decodes,
            has_prefills=has_prefills,
            num_splits=num_splits,
            partial=partial,
            partial_log=partial_log,
        )
        return TritonPlan(
            step=step, slot_mapping=batch.slot_mapping, num_tokens=starts[num_requests]
        )

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
        assert isinstance(plan, TritonPlan), plan
        paged = _paged(cache)
        write_cache(self._launcher, k, v, paged, plan.slot_mapping)
        paged_attention(
            self._launcher,
            self._shape,
            plan.step,
            q,
            paged,
            out,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
        )
        if plan.num_tokens < out.shape[0]:
            out[plan.num_tokens :] = 0
        return out


def _paged(cache: LayerCache) -> PagedCache:
    return PagedCache(
        k=cache.tensors["k"],
        v=cache.tensors["v"],
        k_scale=cache.tensors.get("k_scale"),
        v_scale=cache.tensors.get("v_scale"),
    )
