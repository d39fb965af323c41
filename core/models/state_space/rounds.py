"""A step cut at the ends of blocks, and where the states of its requests lie.

A block holds the states after the last token computed in it, so a step leaves states at every end
of a block that it crosses. Pieces of different requests that do not wait for one another make a
round, and the operators run once a round. The first piece of a request starts from the block of its
last token before the step, each further one from where the piece before it ended.

A decode step, one token for each request, is one round whose blocks are found on the device from
lengths and tables alone, so that it can be recorded.

A step that fails has perhaps changed the states of blocks that are not full; its requests give
their blocks back and are computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from quire.core.interface.fusion import StatePieces
from quire.core.interface.recurrence import Sequences, StateSlots
from quire.core.models.transformers_adapter.pages import PagesPlan

Scan: TypeAlias = Callable[[Sequence[Tensor], Sequences], Tensor]
"""(states or pages, sequences) to rows [n, C]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Round:
    """One piece of each of some requests."""

    rows: Tensor | None
    """int64 [n] of the flat batch; None: all of them in their order."""
    sequences: Sequences
    """With the blocks of its states."""
    pieces: StatePieces
    """The same, as rows of the flat batch."""

    def scan(self, pages: Sequence[Tensor], scan: Scan, *, in_pages: bool) -> Tensor:
        """`scan`, which overwrites the states of the sequences that it is given.

        pages: [num_blocks, ...] each; `in_pages`: the operators read and write states there.
        """
        if in_pages:
            return scan(pages, self.sequences)
        slots = self.sequences.slots
        assert slots is not None, "a round without blocks"
        states = [page.index_select(0, slots.sources.clamp(min=0)) for page in pages]
        for state in states:
            is_new = (slots.sources < 0).view(-1, *[1] * (state.dim() - 1))
            state.masked_fill_(is_new, 0)
        out = scan(states, replace(self.sequences, slots=None))
        for page, state in zip(pages, states, strict=True):
            page.index_copy_(0, slots.targets, state.to(page.dtype))
        return out


def cut(plan: PagesPlan) -> tuple[Round, ...]:
    """The rounds of a step, the same for all layers."""
    if plan.is_decode:
        return (_decode_round(plan),)
    size = plan.block_size
    pieces = [_pieces(r.num_past, r.num_past + r.num_new, size) for r in plan.requests]
    rounds = []
    for number in range(max(map(len, pieces))):
        chosen = [i for i, ends in enumerate(pieces) if number < len(ends)]
        rounds.append(_round(plan, pieces, chosen, number))
    return tuple(rounds)


def _decode_round(plan: PagesPlan) -> Round:
    """One token of each request; nothing of it is known to the host but how many there are."""
    count = len(plan.requests)
    num_past = plan.seq_lens.long() - 1
    before = ((num_past - 1) // plan.block_size).clamp_(min=0)
    after = num_past // plan.block_size
    blocks = plan.block_table.gather(1, torch.stack((before, after), dim=1)).long()
    slots = StateSlots(
        sources=blocks[:, 0].masked_fill(num_past == 0, -1), targets=blocks[:, 1].contiguous()
    )
    starts = plan.query_start_loc
    return Round(
        rows=None,
        sequences=Sequences(starts=starts, starts_host=range(count + 1), slots=slots),
        pieces=StatePieces(begins=starts[:-1], ends=starts[1:], slots=slots),
    )


def _pieces(begin: int, end: int, size: int) -> list[tuple[int, int]]:
    """[begin, end) cut at multiples of `size`."""
    inner = range(begin - begin % size + size, end, size)
    return list(pairwise([begin, *inner, end]))


def _round(
    plan: PagesPlan, pieces: list[list[tuple[int, int]]], chosen: list[int], number: int
) -> Round:
    device = plan.slot_mapping.device
    starts, rows, begins = [0], list[int](), list[int]()
    sources, targets = list[int](), list[int]()
    for index in chosen:
        request = plan.requests[index]
        begin, end = pieces[index][number]
        first = request.begin - request.num_past
        begins.append(first + begin)
        rows.extend(range(first + begin, first + end))
        starts.append(starts[-1] + end - begin)
        sources.append((begin - 1) // plan.block_size)
        targets.append((end - 1) // plan.block_size)
    is_whole = all(len(ends) == 1 for ends in pieces)
    table_rows = torch.tensor([plan.requests[i].row for i in chosen], device=device)
    before, after = (torch.tensor(blocks, device=device) for blocks in (sources, targets))
    from_blocks = plan.block_table[table_rows, before.clamp(min=0)].long()
    slots = StateSlots(
        sources=torch.where(before < 0, -1, from_blocks),
        targets=plan.block_table[table_rows, after].long(),
    )
    ends = [begin + b - a for begin, (a, b) in zip(begins, pairwise(starts), strict=True)]
    return Round(
        rows=None if is_whole else torch.tensor(rows, device=device),
        sequences=Sequences(
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            starts_host=starts,
            slots=slots,
        ),
        pieces=StatePieces(
            begins=torch.tensor(begins, dtype=torch.int32, device=device),
            ends=torch.tensor(ends, dtype=torch.int32, device=device),
            slots=slots,
        ),
    )
