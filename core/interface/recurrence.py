"""Layers that carry a state instead of keys and values: what they keep, and where.

Extension `recurrent`. A cache group of kind `recurrent` has blocks of `block_size` tokens like any
other, but a block holds one state for all its tokens: the state after the last token computed in
it. Token t of a request belongs to block block_table[r, t // block_size]. So a step that computes
tokens [n, m)

    starts from the state in the block of token n - 1 (zeros if n is 0), and
    leaves one state in the block of every token t < m that ends its block, and one in the block of
    token m - 1.

A state at the end of a block is that of a prefix, which other requests may share; no block before
the one of token n - 1 is ever read. The cache manager treats such a group as a sliding window of
two tokens. Model code cuts a step's tokens at the ends of blocks and calls the scan operators once
for each round of pieces.

A device that claims the feature `state_slots` is handed the page itself with `Sequences.slots`, and
its operators read and write states where they lie; others get copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quire.core.interface.attention import CacheTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class StateSpec:
    """What one layer keeps for each block: the tensors of its state."""

    tensors: tuple[CacheTensor, ...]
    """Each [num_blocks, *block_shape]."""
    block_size: int
    """Tokens in a block."""

    @property
    def kind(self) -> str:
        """As in `CacheGroup.kind`."""
        return "recurrent"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StateSlots:
    """Where sequences find and leave their states in a page [num_blocks, ...].

    Targets are distinct, but for the null block, in which padding ends and no sequence starts. A
    target may be its own sequence's source, and is no other's.
    """

    sources: Tensor
    """int64 [S], on the device: the block to start from; negative: start from zeros."""
    targets: Tensor
    """int64 [S], on the device: the block that gets the state after the last row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sequences:
    """Which rows belong together: sequence s owns rows [starts[s], starts[s + 1]) of T.

    Rows past the last start are padding: their results are undefined and they touch no state.
    """

    starts: Tensor
    """int32 [S + 1], on the device."""
    starts_host: Sequence[int]
    """The same."""
    slots: StateSlots | None = None
    """Only for devices that claim `state_slots`: the operator's `states` is then a page
    [num_blocks, ...], dense but for its first dimension, of which no other block is touched.
    None: `states` is [S, ...], in the order of the sequences.
    """

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.starts_host) - 1

    @property
    def max_length(self) -> int:
        """Rows of the longest sequence."""
        starts = self.starts_host
        return max((b - a for a, b in itertools.pairwise(starts)), default=0)
