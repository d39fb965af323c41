"""A step as arrays of a few shapes: padded to buckets, its queries cut into tiles."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.core.interface import NULL_BLOCK, QuireError, Reason, UnsupportedError
from quire_jax.attention import CHUNK_BLOCKS
from quire_jax.requests import ScheduledRequest

Numbers = npt.NDArray[Any]
TILE = 16
"""Queries of one request that attend together, where a step computes more than one of any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """All that a compiled step depends on."""

    num_tokens: int
    num_requests: int
    tile: int

    @property
    def num_tiles(self) -> int:
        """Enough however the tokens fall: each request may leave one tile unfilled."""
        return self.num_requests + (self.num_tokens - self.num_requests) // self.tile


class Buckets:
    """The shapes that steps are padded to."""

    def __init__(
        self, tokens: Sequence[int], requests: Sequence[int], *, max_tokens: int, max_requests: int
    ) -> None:
        """Raises: UnsupportedError if the largest bucket is smaller than the largest step."""
        self._tokens = _up_to(tokens, max_tokens, "max_num_batched_tokens")
        self._requests = _up_to(requests, max_requests, "max_num_seqs")

    def rows(self, count: int) -> int:
        """Rows of logits for `count` that are wanted."""
        return _bucket(self._requests, count)

    @property
    def row_counts(self) -> tuple[int, ...]:
        """All that `rows` may answer with."""
        return tuple(self._requests)

    def shape_of(self, counts: Sequence[int]) -> StepShape:
        """The shape for requests with so many new tokens each."""
        if max(counts) == 1:
            size = self.rows(len(counts))
            return StepShape(num_tokens=size, num_requests=size, tile=1)
        return self._mixed(_bucket(self._tokens, sum(counts)))

    def all_shapes(self) -> list[StepShape]:
        """Every shape that `shape_of` may answer with."""
        decodes = [StepShape(num_tokens=n, num_requests=n, tile=1) for n in self._requests]
        return decodes + [self._mixed(size) for size in self._tokens]

    def _mixed(self, num_tokens: int) -> StepShape:
        num_requests = min(num_tokens, self._requests[-1])
        return StepShape(num_tokens=num_tokens, num_requests=num_requests, tile=TILE)


def make_step_arrays(
    scheduled: Sequence[ScheduledRequest],
    shape: StepShape,
    *,
    num_groups: int,
    block_size: int,
    max_model_len: int,
) -> dict[str, Numbers]:
    """The arrays of a step, all int32.

    token_ids, positions [T]; slot_blocks [groups, T] and slot_offsets [T], where keys and values
    go; block_tables [groups, R, blocks]; tiles [tiles, tile], which tokens a tile holds (T: none);
    tile_requests [tiles]. Padding tokens write to NULL_BLOCK and stand in no tile.
    """
    arrays = empty_step_arrays(
        shape, num_groups=num_groups, block_size=block_size, max_model_len=max_model_len
    )
    token, tile = 0, 0
    for row, part in enumerate(scheduled):
        count = part.num_new
        here = slice(token, token + count)
        positions = np.arange(part.num_computed, part.num_computed + count)
        arrays["token_ids"][here] = part.new_tokens
        arrays["positions"][here] = positions
        arrays["slot_offsets"][here] = positions % block_size
        for group in range(num_groups):
            table = np.asarray(part.blocks(group), np.int32)
            arrays["block_tables"][group, row, : len(table)] = table
            if len(table):
                arrays["slot_blocks"][group, here] = table[positions // block_size]
        num_tiles = -(-count // shape.tile)
        tokens = np.full(num_tiles * shape.tile, shape.num_tokens)
        tokens[:count] = np.arange(token, token + count)
        arrays["tiles"][tile : tile + num_tiles] = tokens.reshape(num_tiles, shape.tile)
        arrays["tile_requests"][tile : tile + num_tiles] = row
        token, tile = token + count, tile + num_tiles
    return arrays


def empty_step_arrays(
    shape: StepShape, *, num_groups: int, block_size: int, max_model_len: int
) -> dict[str, Numbers]:
    """A step of padding alone."""
    chunk = CHUNK_BLOCKS * block_size
    width = -(-max_model_len // chunk) * CHUNK_BLOCKS
    num_tokens = shape.num_tokens
    sizes: dict[str, tuple[tuple[int, ...], int]] = {
        "token_ids": ((num_tokens,), 0),
        "positions": ((num_tokens,), 0),
        "slot_blocks": ((num_groups, num_tokens), NULL_BLOCK),
        "slot_offsets": ((num_tokens,), 0),
        "block_tables": ((num_groups, shape.num_requests, width), NULL_BLOCK),
        "tiles": ((shape.num_tiles, shape.tile), num_tokens),
        "tile_requests": ((shape.num_tiles,), 0),
    }
    return {name: np.full(size, value, np.int32) for name, (size, value) in sizes.items()}


def _bucket(buckets: Sequence[int], needed: int) -> int:
    index = bisect_left(buckets, needed)
    if index == len(buckets):
        raise QuireError(
            f"a step of {needed} tokens or requests is more than the worker was built for "
            f"({buckets[-1]}); schedule within max_num_batched_tokens and max_num_seqs"
        )
    return buckets[index]


def _up_to(buckets: Sequence[int], needed: int, setting: str) -> list[int]:
    """The buckets of which a step of `needed` may need one."""
    if buckets[-1] < needed:
        reason = Reason(
            code=f"jax.{setting}",
            need=f"{setting} {needed}",
            have=f"buckets up to {buckets[-1]}",
            remedy=f"set {setting} to at most {buckets[-1]}",
        )
        raise UnsupportedError([reason], what="compiling steps of this size")
    return list(buckets[: bisect_left(buckets, needed) + 1])
