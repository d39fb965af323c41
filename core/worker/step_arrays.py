"""The flat arrays of one step, built with numpy from the batch's columns.

rows of the step     [ request 0 | request 1 | ... | padding ]
token_ids [T]        each request's new tokens, one after the other
query_start_loc      where each request's tokens begin, and the end
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from quire.core.interface import NULL_BLOCK
from quire.core.worker.buckets import Buckets

_Integer = TypeVar("_Integer", np.int32, np.int64)

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]
Array = npt.NDArray[np.generic]
RowIndex = slice | Int64s
"""Rows of the batch's columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The real requests of a step, R of them."""

    rows: Int64s
    """[R] in the batch's columns."""
    num_computed: Int64s
    num_new: Int64s

    @property
    def num_tokens(self) -> int:
        """Real tokens of the step."""
        return int(self.num_new.sum())

    @property
    def ends(self) -> Int64s:
        """[R]: how many tokens each request has computed after the step."""
        return self.num_computed + self.num_new


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """What attention and the model need of a step: T tokens and R requests, padding included."""

    positions: Int64s
    """[T]."""
    query_start_loc: Int32s
    """[R + 1]."""
    seq_lens: Int32s
    """[R]."""
    last_tokens: Int64s
    """[real R]: the flat index of each real request's last token."""
    block_tables: list[Array]
    """[R, max_blocks] for each cache group."""
    slot_mappings: list[Int64s]
    """[T] for each cache group."""
    max_query_len: int
    max_seq_len: int
    source_lens: Int32s | None = None
    """[R]: encoder tokens of each request; None: no group follows them. Such a group has no slots
    here: its blocks are filled by the encoder."""

    @property
    def num_tokens(self) -> int:
        """Tokens, padding included."""
        return len(self.positions)

    @property
    def num_requests(self) -> int:
        """Requests, padding included."""
        return len(self.seq_lens)


def make_step_arrays(
    step: StepRows,
    tables: Sequence[Array],
    block_sizes: Sequence[int],
    buckets: Buckets,
    source_groups: frozenset[int] = frozenset(),
    num_source_tokens: Int64s | None = None,
) -> StepArrays:
    """The flat arrays of a step, padded to the next bucket. `tables` are [rows, blocks].

    Blocks of `source_groups` follow `num_source_tokens` [R], the encoder's tokens.
    """
    lengths = buckets.pad(step.num_new) if buckets.are_any else step.num_new
    num_computed = _extended(step.num_computed, len(lengths))
    query_start_loc = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=query_start_loc[1:])
    seq_lens = num_computed + lengths
    owner = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.arange(query_start_loc[-1]) + (num_computed - query_start_loc[:-1])[owner]
    max_seq_len = int(seq_lens.max())
    num_tokens = step.num_tokens
    source_lens = None
    if num_source_tokens is not None:
        source_lens = _extended(num_source_tokens, len(lengths)).astype(np.int32)
    block_tables, slot_mappings = [], []
    for group, (table, block_size) in enumerate(zip(tables, block_sizes, strict=True)):
        if group in source_groups and source_lens is not None:
            width = max(1, -(-int(source_lens.max()) // block_size))
            block_tables.append(_gathered(table, step.rows, len(lengths), width))
            slot_mappings.append(np.zeros(0, np.int64))
            continue
        width = -(-max_seq_len // block_size)
        block_tables.append(_gathered(table, step.rows, len(lengths), width))
        slot_mappings.append(_slots(block_tables[-1], owner, positions, block_size))
    positions[num_tokens:] = 0
    return StepArrays(
        positions=positions,
        query_start_loc=query_start_loc.astype(np.int32),
        seq_lens=seq_lens.astype(np.int32),
        last_tokens=query_start_loc[: len(step.rows)] + step.num_new - 1,
        block_tables=block_tables,
        slot_mappings=slot_mappings,
        max_query_len=int(lengths.max()),
        max_seq_len=max_seq_len,
        source_lens=source_lens,
    )


def next_decode_arrays(
    last: StepArrays,
    step: StepRows,
    tables: Sequence[Array],
    block_sizes: Sequence[int],
    source_groups: frozenset[int],
    *,
    computed: Sequence[int],
    has_new_blocks: bool,
) -> StepArrays:
    """The arrays of a step that computes one more token of each request of `last`.

    No request of `last`, padding included, had more than one token; `computed` is
    `step.num_computed` as numbers. What stays the same is shared with `last`, which stays whole:
    an asynchronous device may still read it.
    """
    num_real = len(step.rows)
    positions = _one_more(last.positions, num_real)
    max_seq_len = last.max_seq_len + 1
    block_tables, slot_mappings = [], []
    for group, (table, block_size) in enumerate(zip(tables, block_sizes, strict=True)):
        gathered, slots = last.block_tables[group], last.slot_mappings[group]
        if group not in source_groups:
            width = -(-max_seq_len // block_size)
            if has_new_blocks or gathered.shape[1] != width:
                gathered = _gathered(table, step.rows, last.num_requests, width)
            if 0 in [number % block_size for number in computed]:
                slots = _slots(gathered, np.arange(len(positions)), positions, block_size)
            else:
                slots = _one_more(slots, num_real)
        block_tables.append(gathered)
        slot_mappings.append(slots)
    return StepArrays(
        positions=positions,
        query_start_loc=last.query_start_loc,
        seq_lens=_one_more(last.seq_lens, num_real),
        last_tokens=last.last_tokens,
        block_tables=block_tables,
        slot_mappings=slot_mappings,
        max_query_len=1,
        max_seq_len=max_seq_len,
        source_lens=last.source_lens,
    )


def _one_more(column: npt.NDArray[_Integer], num_real: int) -> npt.NDArray[_Integer]:
    """A new column: one more for each real request, and padding as it was."""
    more = column.copy()
    more[:num_real] += 1
    return more


def _extended(column: Int64s, size: int) -> Int64s:
    if len(column) == size:
        return column
    return np.concatenate([column, np.zeros(size - len(column), column.dtype)])


def _gathered(table: Array, rows: Int64s, num_rows: int, width: int) -> Array:
    """The block table of the step: the rows' blocks, and NULL_BLOCK for padding."""
    known = min(width, table.shape[1])
    if len(rows) == num_rows and known == width:
        return table[:, :width].take(rows, axis=0)
    gathered = np.full((num_rows, width), NULL_BLOCK, table.dtype)
    gathered[: len(rows), :known] = table[:, :known].take(rows, axis=0)
    return gathered


def _slots(
    table: Array,
    owner: Int64s,
    positions: Int64s,
    block_size: int,
) -> Int64s:
    """Where each token's key and value go.

    Padding behind a request's last token goes where that request's next tokens will, or into
    NULL_BLOCK: attention reads those slots, and must not find NaN there.
    """
    block, offset = np.divmod(positions, block_size)
    slots: Int64s = table[owner, block].astype(np.int64) * block_size + offset
    return slots
