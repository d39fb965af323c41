"""FlashAttention 2 on CUDA and ROCm, and AITER, whose function takes the same arguments."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from quire.backends.torch_accelerator.providers.library_attention import (
    LibraryAttention,
    LibraryPlan,
)
from quire.core.interface import AttentionSpec
from quire.kernels_triton.attention import PagedCache
from quire.kernels_triton.launch import Launcher


class FlashAttnAttention(LibraryAttention):
    """`flash_attn_varlen_func` over pages, whose sizes it wants in multiples of 256.

    Source: Dao 2023, FlashAttention-2; the library's docstring of `flash_attn_varlen_func`: with
    `causal`, the mask is aligned with the last query and the last key.
    """

    name = "flash_attn"
    block_step = 256
    _module = "flash_attn"

    def __init__(self, spec: AttentionSpec, torch_device: str, launcher: Launcher) -> None:
        super().__init__(spec, torch_device, launcher)
        self._function: Any = importlib.import_module(self._module).flash_attn_varlen_func

    def _attend_pages(
        self,
        q: Tensor,
        cache: PagedCache,
        plan: LibraryPlan,
        out: Tensor,
        alibi_slopes: Tensor | None,
    ) -> None:
        answer = self._function(
            q,
            cache.k,
            cache.v,
            cu_seqlens_q=plan.query_starts,
            cu_seqlens_k=plan.key_starts,
            max_seqlen_q=plan.max_query_len,
            max_seqlen_k=plan.max_seq_len,
            softmax_scale=self.spec.scale,
            causal=True,
            window_size=(self._window_left, 0 if self._window_left >= 0 else -1),
            alibi_slopes=alibi_slopes,
            block_table=plan.block_table,
            **self._soft_cap(),
        )
        out.copy_(answer[0] if isinstance(answer, tuple) else answer)

    def _soft_cap(self) -> dict[str, float]:
        return {"softcap": self.spec.soft_cap or 0.0}


class AiterAttention(FlashAttnAttention):
    """AITER's function of the same name."""

    name = "aiter"
    block_step = 16
    _module = "aiter"

    def _soft_cap(self) -> dict[str, float]:
        return {"logits_soft_cap": self.spec.soft_cap or 0.0}
