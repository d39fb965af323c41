"""The Intel extension for PyTorch on XPU, for sites that still run torch 2.8 with it."""

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


class IpexAttention(LibraryAttention):
    """`ipex.llm.modules.PagedAttention.flash_attn_varlen_func`.

    Source: the extension's documentation of its LLM modules, release 2.8.
    """

    name = "ipex"
    has_alibi = False
    has_soft_cap = False
    kinds = ("causal",)
    block_step = 16

    def __init__(self, spec: AttentionSpec, torch_device: str, launcher: Launcher) -> None:
        super().__init__(spec, torch_device, launcher)
        library: Any = importlib.import_module("intel_extension_for_pytorch")
        self._function: Any = library.llm.modules.PagedAttention.flash_attn_varlen_func

    def _attend_pages(
        self,
        q: Tensor,
        cache: PagedCache,
        plan: LibraryPlan,
        out: Tensor,
        alibi_slopes: Tensor | None,
    ) -> None:
        self._function(
            out,
            q,
            cache.k,
            cache.v,
            plan.query_starts,
            plan.key_starts,
            plan.max_query_len,
            plan.max_seq_len,
            self.spec.scale,
            True,
            plan.block_table,
            None,
        )
