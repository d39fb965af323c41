"""Pages of encoder-decoders: keys and values a token a slot, of requests and of their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.interface.attention import AttentionBatch, AttentionPlan, LayerCache
from quire.core.models.attention_groups import AttentionGroup, PageTensor
from quire.core.models.transformers_adapter.cached import own_spec
from quire.core.models.transformers_adapter.pages import OwnPages, read_slots, write_slots

LayerKeys = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [heads, n, size]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """Keys and values of one token in one layer."""

    num_heads: int
    head_size: int
    v_head_size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CrossPlan(AttentionPlan):
    """Where the sources of a step's requests lie."""

    lengths: tuple[int, ...]
    block_table: Tensor
    block_size: int

    def slots(self, request: int) -> Tensor:
        """Slots of a request's source, int64 [S]; one in NULL_BLOCK for a request without any."""
        positions = torch.arange(max(1, self.lengths[request]), device=self.block_table.device)
        blocks = self.block_table[request].long()[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


class CrossPages(OwnPages):
    """Pages that the encoder's side fills."""

    def plan(self, batch: AttentionBatch) -> CrossPlan:  # type: ignore[override]  # of its own
        """The lengths and blocks of the sources."""
        return CrossPlan(
            lengths=tuple(batch.seq_lens_host),
            block_table=batch.block_table,
            block_size=self.spec.block_size,
        )


def page_group(
    name: str,
    shapes: Sequence[LayerShape],
    layer: int,
    *,
    dtype: str,
    cache_dtype: str,
    block_size: int,
    max_tokens: int | None = None,
) -> AttentionGroup:
    """One group with one layer that holds the keys and values of all; `max_tokens`: of sources."""
    pages = []
    for index, shape in enumerate(shapes):
        sizes = {"k": shape.head_size, "v": shape.v_head_size}
        pages += [
            PageTensor(name=f"{part}{index}", shape=(shape.num_heads, size), is_per_token=True)
            for part, size in sizes.items()
        ]
    kind = "causal" if max_tokens is None else "cross"
    spec = own_spec(dtype=dtype, cache_dtype=cache_dtype, block_size=block_size, kind=kind)
    return AttentionGroup(
        name=name, spec=spec, layers=(layer,), pages=tuple(pages), max_tokens=max_tokens
    )


def read_layers(
    cache: LayerCache, num_layers: int, slots: Tensor, dtype: torch.dtype
) -> list[LayerKeys]:
    """Keys and values of each layer at the slots, [heads, n, size]."""
    return [
        (
            read_slots(cache.tensors[f"k{layer}"], slots).transpose(0, 1).to(dtype),
            read_slots(cache.tensors[f"v{layer}"], slots).transpose(0, 1).to(dtype),
        )
        for layer in range(num_layers)
    ]


def write_layers(
    cache: LayerCache, layers: Sequence[LayerKeys], slots: Tensor, *, first: int = 0
) -> None:
    """Writes tokens from `first` on of each layer's keys and values to the slots."""
    for index, (keys, values) in enumerate(layers):
        write_slots(cache.tensors[f"k{index}"], slots, keys[:, first:].transpose(0, 1))
        write_slots(cache.tensors[f"v{index}"], slots, values[:, first:].transpose(0, 1))
