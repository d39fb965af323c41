"""What libraries of attention have in common: the cache of the Triton kernels, and one varlen call.

Their caches are laid out as ours is, keys and values [N, B, Hk, D], so blocks are written, copied
and exchanged as ever, and only who attends is another.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.backends.torch_accelerator.attention import TritonAttention
from quire.core.interface import AttentionBatch, AttentionPlan, AttentionSpec, LayerCache, Reason
from quire.kernels_triton.attention import PagedCache
from quire.kernels_triton.cache import write_cache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LibraryPlan(AttentionPlan):
    """A step of R requests and T rows as libraries read it."""

    slot_mapping: Tensor
    query_starts: Tensor
    """int32 [R + 1]."""
    key_starts: Tensor
    """int32 [R + 1]: the running sum of `seq_lens`."""
    seq_lens: Tensor
    """int32 [R]."""
    block_table: Tensor
    """int32 [R, blocks], every entry a block that exists."""
    max_query_len: int
    max_seq_len: int
    num_tokens: int
    """Rows that belong to a request; those after them are padding."""


class LibraryAttention(TritonAttention):
    """Attention of a library over our cache. A subclass says what it takes and calls it."""

    name: str
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    kinds: tuple[str, ...] = ("causal", "sliding_window")
    max_head_size: int = 256
    block_step: int = 1
    """Blocks must be multiples of so many tokens."""
    has_soft_cap: bool = True
    has_alibi: bool = True

    def provider(self) -> str:
        return self.name

    @classmethod
    def reasons_against(cls, spec: AttentionSpec) -> list[Reason]:
        return [*super().reasons_against(spec), *cls._library_reasons(spec)]

    @classmethod
    def _library_reasons(cls, spec: AttentionSpec) -> Iterator[Reason]:
        remedy = f"use the attention of Quire's own kernels, which is the default, not {cls.name}"
        found = (
            ("kind", spec.kind, ", ".join(cls.kinds), spec.kind not in cls.kinds),
            ("dtype", spec.dtype, ", ".join(cls.dtypes), spec.dtype not in cls.dtypes),
            (
                "cache_dtype",
                f"a cache of {spec.cache_dtype}",
                f"caches of the dtype of queries, {spec.dtype}",
                spec.cache_dtype != spec.dtype,
            ),
            (
                "head_size",
                f"heads of {spec.head_size}, values of {spec.v_head_size}",
                f"equal sizes up to {cls.max_head_size}, multiples of 8",
                spec.head_size != spec.v_head_size
                or spec.head_size > cls.max_head_size
                or spec.head_size % 8 != 0,
            ),
            (
                "block_size",
                f"blocks of {spec.block_size}",
                f"multiples of {cls.block_step}",
                spec.block_size % cls.block_step != 0,
            ),
            ("soft_cap", "a soft cap", "none", bool(spec.soft_cap) and not cls.has_soft_cap),
            ("sinks", "attention sinks", "none", spec.has_sinks),
            ("alibi", "ALiBi", "none", spec.has_alibi and not cls.has_alibi),
        )
        for name, need, have, is_against in found:
            if is_against:
                yield Reason(code=f"attention.{name}", need=need, have=have, remedy=remedy)

    def plan(self, batch: AttentionBatch) -> LibraryPlan:
        num = batch.num_requests
        seq_lens = batch.seq_lens[:num]
        key_starts = torch.zeros(num + 1, dtype=torch.int32, device=seq_lens.device)
        torch.cumsum(seq_lens, 0, out=key_starts[1:])
        size = self.spec.block_size
        blocks = batch.block_table[:num, : -(-batch.max_seq_len // size)]
        # Entries past a request's end are undefined, and a library may read what they name.
        columns = torch.arange(blocks.shape[1], device=blocks.device) * size
        table = torch.where(columns < seq_lens.unsqueeze(1), blocks, 0)
        if self.spec.kind == "sliding_window":
            first = seq_lens - torch.diff(batch.query_start_loc[: num + 1])
            first = first - (self.spec.window or 0) + 1
            table = torch.where(columns + size > first.unsqueeze(1), table, 0)
        return LibraryPlan(
            slot_mapping=batch.slot_mapping,
            query_starts=batch.query_start_loc[: num + 1],
            key_starts=key_starts,
            seq_lens=seq_lens,
            block_table=table.contiguous(),
            max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len,
            num_tokens=batch.query_start_loc_host[num],
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
        assert isinstance(plan, LibraryPlan), plan
        assert sinks is None, self.name
        paged = PagedCache(k=cache.tensors["k"], v=cache.tensors["v"])
        write_cache(self._launcher, k, v, paged, plan.slot_mapping)
        rows = q[: plan.num_tokens].contiguous()
        self._attend_pages(rows, paged, plan, out[: plan.num_tokens], alibi_slopes)
        if plan.num_tokens < out.shape[0]:
            out[plan.num_tokens :] = 0
        return out

    @abstractmethod
    def _attend_pages(
        self,
        q: Tensor,
        cache: PagedCache,
        plan: LibraryPlan,
        out: Tensor,
        alibi_slopes: Tensor | None,
    ) -> None:
        """Writes out [T, Hq, D] for q [T, Hq, D]; keys and values of the step are in the cache."""

    @property
    def _window_left(self) -> int:
        """How many tokens before its own a query sees; -1: all."""
        window = self.spec.window if self.spec.kind == "sliding_window" else None
        return -1 if window is None else window - 1
