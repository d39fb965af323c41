"""Pages that a model keeps itself: plain tensors of blocks, for keys, states or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from quire.core.errors import DeviceOutOfMemory, QuireError
from quire.core.interface.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
    CacheLayout,
    LayerCache,
)
from quire.core.interface.errors import Reason
from quire.core.models.attention_groups import AttentionGroup, PageTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSlice:
    """One request's part of a step."""

    row: int
    """Of the block table."""
    begin: int
    end: int
    """Its rows of the flat batch."""
    num_past: int
    """Tokens before this step."""

    @property
    def num_new(self) -> int:
        """Tokens of this step."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagesPlan(AttentionPlan):
    """Where the requests of a step have their tokens and their blocks."""

    requests: tuple[RequestSlice, ...]
    query_start_loc: Tensor
    """int32 [R + 1], on the device."""
    seq_lens: Tensor
    """int32 [R], on the device: with the tokens of this step."""
    block_table: Tensor
    """[R, max_blocks]."""
    slot_mapping: Tensor
    """int64 [T]."""
    block_size: int

    @property
    def is_decode(self) -> bool:
        """Whether every request has one new token."""
        return all(request.num_new == 1 for request in self.requests)

    def slots(self, request: RequestSlice, length: int) -> Tensor:
        """Slots of a request's first `length` tokens, int64 [length]."""
        positions = torch.arange(length, device=self.slot_mapping.device)
        blocks = self.block_table[request.row].long()[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def block(self, request: RequestSlice, position: int) -> Tensor:
        """The block that holds a position, int64 [1]."""
        index = position // self.block_size
        return self.block_table[request.row, index : index + 1].long()


class OwnPages(AttentionBackend):
    """Keeps what a model asks it to keep; attends to nothing itself."""

    def __init__(self, group: AttentionGroup, torch_device: Any) -> None:
        self.spec: AttentionSpec = group.spec
        self._pages: tuple[PageTensor, ...] = group.pages
        self._torch_device = torch_device

    def provider(self) -> str:
        """Nobody's kernel."""
        return "model"

    @classmethod
    def reasons_against(cls, spec: AttentionSpec) -> list[Reason]:  # noqa: ARG003 - the contract
        """None: torch keeps anything."""
        return []

    def cache_layout(self) -> CacheLayout:
        """The tensors as they are."""
        tensors = tuple(page.in_blocks(self.spec) for page in self._pages)
        size = sum(prod(t.block_shape) * getattr(torch, t.dtype).itemsize for t in tensors)
        kept = ", ".join(f"{t.name} {list(t.block_shape)} {t.dtype}" for t in tensors)
        return CacheLayout(tensors=tensors, bytes_per_block=size, description=kept)

    def allocate(self, num_blocks: int) -> LayerCache:
        """Zeros.

        Raises: DeviceOutOfMemory.
        """
        layout = self.cache_layout()
        try:
            tensors = {
                tensor.name: torch.zeros(
                    (num_blocks, *tensor.block_shape),
                    dtype=getattr(torch, tensor.dtype),
                    device=self._torch_device,
                )
                for tensor in layout.tensors
            }
        except RuntimeError as error:
            raise DeviceOutOfMemory(
                f"{num_blocks} blocks of {layout.bytes_per_block} bytes do not fit: {error}; "
                "give the cache less memory",
                requested_bytes=num_blocks * layout.bytes_per_block,
                tag="cache",
            ) from error
        return LayerCache(tensors=tensors, block_size=self.spec.block_size)

    def plan(self, batch: AttentionBatch) -> PagesPlan:
        """The requests' parts of the step."""
        starts = batch.query_start_loc_host
        requests = tuple(
            RequestSlice(
                row=row,
                begin=starts[row],
                end=starts[row + 1],
                num_past=batch.seq_lens_host[row] - (starts[row + 1] - starts[row]),
            )
            for row in range(batch.num_requests)
        )
        return PagesPlan(
            requests=requests,
            query_start_loc=batch.query_start_loc,
            seq_lens=batch.seq_lens,
            block_table=batch.block_table,
            slot_mapping=batch.slot_mapping,
            block_size=self.spec.block_size,
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
        """Never called: the model attends in its own code."""
        raise QuireError("pages of a model's own attend to nothing; the model must do it")

    def copy_blocks(self, cache: LayerCache, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies whole blocks of every tensor."""
        for tensor in cache.tensors.values():
            from_ids, to_ids = (
                torch.tensor(list(i), device=tensor.device) for i in (source, target)
            )
            tensor.index_copy_(0, to_ids, tensor.index_select(0, from_ids))

    def export_blocks(self, cache: LayerCache, block_ids: Sequence[int]) -> Tensor:
        """Not possible: no other backend has such pages.

        Raises: QuireError.
        """
        raise QuireError("a model that keeps its pages itself cannot export them to another worker")

    def import_blocks(self, cache: LayerCache, block_ids: Sequence[int], blocks: Tensor) -> None:
        """Not possible.

        Raises: QuireError.
        """
        raise QuireError("a model that keeps its pages itself cannot import another worker's")


def write_slots(tensor: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Writes rows [n, ...] to the slots int64 [n] of a tensor [N, B, ...]."""
    tensor.flatten(0, 1).index_copy_(0, slots, rows.to(tensor.dtype))


def read_slots(tensor: Tensor, slots: Tensor) -> Tensor:
    """Rows [n, ...] at the slots int64 [n] of a tensor [N, B, ...]."""
    return tensor.flatten(0, 1).index_select(0, slots)
