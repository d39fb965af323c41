"""Paged attention by the compiled kernel, in the cache layout of the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.reference import ReferenceAttention
from quire.backends.reference.cache_codec import NARROW
from quire.core.interface import AttentionBatch, AttentionPlan, AttentionSpec, LayerCache

_NATIVE_KINDS = frozenset({"causal", "sliding_window", "chunked", "mla"})
_NATIVE_DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclass(frozen=True, slots=True, eq=False)
class NativePlan(AttentionPlan):
    """The kernel reads the step's own tensors; nothing is prepared but contiguous views of them."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    step: kernels_cpu.Step
    """The same, for layers that are computed in one call."""


class CpuAttention(ReferenceAttention):
    """The compiled kernel; the reference for other kinds, or a cache of another dtype than q."""

    def __init__(self, spec: AttentionSpec, torch_device: str = "cpu") -> None:
        super().__init__(spec, torch_device)
        is_served = spec.kind in _NATIVE_KINDS and spec.dtype in _NATIVE_DTYPES
        is_served = is_served and spec.cache_dtype in (spec.dtype, *NARROW)
        self._is_native = kernels_cpu.HAVE_NATIVE and is_served
        self._window = (spec.window or 0) if spec.kind == "sliding_window" else 0
        self._chunk = (spec.window or 0) if spec.kind == "chunked" else 0

    def provider(self) -> str:
        return f"native:{kernels_cpu.isa()}" if self._is_native else super().provider()

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        if not self._is_native:
            return super().plan(batch)
        num_requests = batch.num_requests
        tensors = (
            batch.query_start_loc[: num_requests + 1].contiguous(),
            batch.seq_lens[:num_requests].contiguous(),
            batch.block_table[:num_requests].to(torch.int32),
            batch.slot_mapping.long().contiguous(),
        )
        return NativePlan(*tensors, kernels_cpu.Step(*tensors))

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        if not self._is_native:
            super().write(k, v, cache, slot_mapping)
            return
        tensors = cache.tensors
        kernels_cpu.write_cache(
            k,
            v,
            tensors["k"],
            tensors.get("v"),
            slot_mapping,
            k_scales=tensors.get("k_scale"),
            v_scales=tensors.get("v_scale"),
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
        if not isinstance(plan, NativePlan):
            return super().forward(
                q, k, v, cache, plan, out, sinks=sinks, alibi_slopes=alibi_slopes
            )
        self.write(k, v, cache, plan.slot_mapping)
        tensors = cache.tensors
        k_cache, k_scales = tensors["k"], tensors.get("k_scale")
        v_cache, v_scales = tensors.get("v"), tensors.get("v_scale")
        if v_cache is None:  # the latent alone: its first features are the values
            v_cache, v_scales = k_cache[..., : self.spec.v_head_size], k_scales
        kernels_cpu.paged_attention(
            q,
            k_cache,
            v_cache,
            plan.block_table,
            plan.seq_lens,
            plan.query_start_loc,
            self.spec.scale,
            self._window,
            self.spec.soft_cap or 0.0,
            out,
            chunk=self._chunk,
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            k_scales=k_scales,
            v_scales=v_scales,
        )
        return out
