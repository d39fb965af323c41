"""A step cut at the ends of blocks, and the states of its requests meanwhile.

A block holds the states after the last token computed in it, so a step leaves states at every end
of a block that it crosses. Pieces of different requests that do not wait for one another make a
round, and the operators run once a round.

States reach their pages when the last layer is done. A step that fails before has changed nothing,
and may be computed again.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.interface.attention import LayerCache
from quire.core.interface.recurrence import Sequences
from quire.core.models.transformers_adapter.pages import PagesPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Round:
    """One piece of each of some requests."""

    rows: Tensor | None
    """int64 [n] of the flat batch; None: all of them in their order."""
    requests: Tensor | None
    """int64 [S]: whose pieces these are; None: all of them in their order."""
    sequences: Sequences
    targets: Tensor
    """int64 [S]: the blocks that hold their last tokens."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounds:
    """A step's pieces, the same for all layers."""

    rounds: tuple[Round, ...]
    sources: Tensor
    """int64 [R]: the blocks that hold the states to start from."""
    is_new: Tensor
    """bool [R]: requests that start from zeros."""
    has_new: bool

    def start(self, page: Tensor) -> Tensor:
        """States [R, ...] before the step; a tensor of their own."""
        states = page.index_select(0, self.sources)
        if self.has_new:
            states[self.is_new] = 0
        return states


def cut(plan: PagesPlan) -> Rounds:
    """The rounds of a step."""
    device, size = plan.slot_mapping.device, plan.block_size
    pieces = [_pieces(r.num_past, r.num_past + r.num_new, size) for r in plan.requests]
    table = plan.block_table
    sources = [max(r.num_past - 1, 0) // size for r in plan.requests]
    rows = torch.tensor([r.row for r in plan.requests], device=device)
    rounds = []
    for number in range(max(map(len, pieces))):
        chosen = [i for i, ends in enumerate(pieces) if number < len(ends)]
        rounds.append(_round(plan, pieces, chosen, number))
    is_new = [r.num_past == 0 for r in plan.requests]
    return Rounds(
        rounds=tuple(rounds),
        sources=table[rows, torch.tensor(sources, device=device)].long(),
        is_new=torch.tensor(is_new, device=device),
        has_new=any(is_new),
    )


def _pieces(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """[begin, end) cut at multiples of `size`."""
    inner = range(begin - begin % size + size, end, size)
    return list(itertools.pairwise([begin, *inner, end]))


def _round(
    plan: PagesPlan, pieces: list[list[tuple[int, int]]], chosen: list[int], number: int
) -> Round:
    device = plan.slot_mapping.device
    starts, rows, blocks = [0], list[int](), list[int]()
    for index in chosen:
        request = plan.requests[index]
        begin, end = pieces[index][number]
        first = request.begin - request.num_past
        rows.extend(range(first + begin, first + end))
        starts.append(starts[-1] + end - begin)
        blocks.append((end - 1) // plan.block_size)
    is_whole = all(len(ends) == 1 for ends in pieces)
    table_rows = torch.tensor([plan.requests[i].row for i in chosen], device=device)
    return Round(
        rows=None if is_whole else torch.tensor(rows, device=device),
        requests=None if is_whole else torch.tensor(chosen, device=device),
        sequences=Sequences(
            starts=torch.tensor(starts, dtype=torch.int32, device=device), starts_host=starts
        ),
        targets=plan.block_table[table_rows, torch.tensor(blocks, device=device)].long(),
    )


class PendingStates:
    """What a step will leave in the pages."""

    def __init__(self) -> None:
        self._writes: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, cache: LayerCache, name: str, targets: Tensor, states: Tensor) -> None:
        """States [S, ...] for the blocks int64 [S] of a page; not to be changed afterwards."""
        self._writes.append((cache.tensors[name], targets, states))

    def write(self) -> None:
        """All of them, when nothing of the model can fail any more."""
        for page, targets, states in self._writes:
            page.index_copy_(0, targets, states.to(page.dtype))
