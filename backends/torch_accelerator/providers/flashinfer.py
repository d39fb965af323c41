"""FlashInfer on CUDA: planned once a step, run for every layer."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from quire.backends.torch_accelerator.errors import device_errors
from quire.backends.torch_accelerator.providers.library_attention import (
    LibraryAttention,
    LibraryPlan,
)
from quire.core.interface import AttentionBatch, AttentionSpec
from quire.kernels_triton.attention import PagedCache
from quire.kernels_triton.launch import Launcher

_WORKSPACE_BYTES = 128 << 20
"""What the library's documentation recommends."""


class FlashInferAttention(LibraryAttention):
    """`BatchPrefillWithPagedKVCacheWrapper` for prompts and single tokens alike.

    Source: https://docs.flashinfer.ai/api/attention.html; Ye et al. 2025, FlashInfer.
    """

    name = "flashinfer"
    has_alibi = False

    def __init__(self, spec: AttentionSpec, torch_device: str, launcher: Launcher) -> None:
        super().__init__(spec, torch_device, launcher)
        library = importlib.import_module("flashinfer")
        with device_errors("workspace"):
            workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=torch_device)
        self._wrapper: Any = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")

    def plan(self, batch: AttentionBatch) -> LibraryPlan:
        """The library keeps the plan of one step, which is the next that runs."""
        plan = super().plan(batch)
        spec, size = self.spec, self.spec.block_size
        lengths = list(batch.seq_lens_host[: batch.num_requests])
        counts = [-(-length // size) for length in lengths]
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        device = plan.block_table.device
        int32 = {"dtype": torch.int32, "device": device}
        numbers = torch.tensor(counts, **int32).unsqueeze(1)  # type: ignore[arg-type]
        columns = torch.arange(plan.block_table.shape[1], device=device)
        dtype = getattr(torch, spec.dtype)
        self._wrapper.plan(
            plan.query_starts,
            torch.tensor(starts, **int32),  # type: ignore[arg-type]
            plan.block_table[columns < numbers],
            torch.tensor([(n - 1) % size + 1 for n in lengths], **int32),  # type: ignore[arg-type]
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_size,
            size,
            causal=True,
            sm_scale=spec.scale,
            window_left=self._window_left,
            logits_soft_cap=spec.soft_cap or 0.0,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        return plan

    def _attend_pages(
        self,
        q: Tensor,
        cache: PagedCache,
        plan: LibraryPlan,
        out: Tensor,
        alibi_slopes: Tensor | None,
    ) -> None:
        self._wrapper.run(q, (cache.k, cache.v), out=out)
