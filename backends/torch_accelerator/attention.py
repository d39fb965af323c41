"""Paged attention by Triton's kernels, in the cache layout of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.backends.reference import ReferenceAttention
from quire.core.interface import (
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
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
from quire.kernels_triton.latent import latent_attention, latent_tiles
from quire.kernels_triton.launch import Launcher

_MAX_HEAD_SIZE = 256
_MAX_RANK, _MAX_ROTATED = 512, 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TritonPlan(AttentionPlan):
    """The step as the kernels read it. Lengths are taken from the device, so it can be replayed."""

    step: PagedStep
    slot_mapping: Tensor
    num_tokens: int
    """Rows that belong to a request; those after them are padding."""


class TritonAttention(ReferenceAttention):
    """Keys in `k` [N, B, Hk, D], values in `v` [N, B, Hk, Dv]; `mla` keeps `k` alone.

    In an int8 cache each (token, head) has a scale, in `k_scale` and `v_scale` float32 [N, B, Hk].
    """

    def __init__(self, spec: AttentionSpec, torch_device: str, launcher: Launcher) -> None:
        super().__init__(spec, torch_device)
        self._launcher = launcher
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
        if spec.kind == "mla":
            return reasons + _reasons_against_latent(spec)
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

    def copy_blocks(self, cache: LayerCache, source: Sequence[int], target: Sequence[int]) -> None:
        from_ids, to_ids = self._index(source), self._index(target)
        for tensor in cache.tensors.values():
            copy_blocks(self._launcher, tensor, from_ids, to_ids)

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
                num_kv_heads=self._num_decode_tiles,
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

    @property
    def _num_decode_tiles(self) -> int:
        """Programs that share a decoded context of one request."""
        if self.spec.kind != "mla":
            return self.spec.num_kv_heads
        return latent_tiles(self._launcher, self._shape)

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        new_values = k if self.spec.kind == "mla" else v
        write_cache(self._launcher, k, new_values, _paged(cache), slot_mapping)

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
        self.write(k, v, cache, plan.slot_mapping)
        paged = _paged(cache)
        if self.spec.kind == "mla":
            latent_attention(self._launcher, self._shape, plan.step, q, paged, out)
        else:
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


def _reasons_against_latent(spec: AttentionSpec) -> list[Reason]:
    found = {
        "head_size": spec.v_head_size > _MAX_RANK
        or spec.head_size - spec.v_head_size > _MAX_ROTATED,
        "soft_cap": bool(spec.soft_cap),
        "sinks": spec.has_sinks,
        "alibi": spec.has_alibi,
    }
    have = f"plain latent attention of rank up to {_MAX_RANK} and {_MAX_ROTATED} rotated features"
    return [
        Reason(
            code=f"attention.{name}",
            need=f"mla of rank {spec.v_head_size} and head size {spec.head_size} with {name}",
            have=have,
            remedy="use another device",
        )
        for name, is_asked in found.items()
        if is_asked
    ]


def _paged(cache: LayerCache) -> PagedCache:
    return PagedCache(
        k=cache.tensors["k"],
        v=cache.tensors.get("v", cache.tensors["k"]),
        k_scale=cache.tensors.get("k_scale"),
        v_scale=cache.tensors.get("v_scale"),
    )
