"""The texts of one step, one after the other in flat arrays: nothing is padded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """R texts with T tokens together."""

    token_ids: Tensor
    """int64 [T]."""
    lengths: tuple[int, ...]
    """[R], at least 1 each."""
    token_types: Tensor | None = None
    """int64 [T]; None: all 0."""

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each text begins."""
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return tuple(starts)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T], from 0 in each text."""
        return torch.cat([torch.arange(n) for n in self.lengths]).to(self.token_ids.device)

    @cached_property
    def by_length(self) -> dict[int, list[int]]:
        """Texts of the same length, by index."""
        found: dict[int, list[int]] = {}
        for index, length in enumerate(self.lengths):
            found.setdefault(length, []).append(index)
        return found

    def rows(self, flat: Tensor, index: int) -> Tensor:
        """The part of [T, ...] that belongs to one text."""
        begin = self.starts[index]
        return flat[begin : begin + self.lengths[index]]
