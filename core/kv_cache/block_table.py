"""What one request holds of the cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

NEVER = sys.maxsize


@dataclass(slots=True, kw_only=True, eq=False)
class BlockTable:
    """The blocks of one request, for each cache group. The manager writes it; others read."""

    root: bytes
    """The parent hash of the first block."""
    block_ids: list[list[int]]
    """For each group; `NULL_BLOCK` where the group keeps nothing any more."""
    hashes: list[list[bytes]]
    """For each distinct block size, the hashes of the full blocks that were asked for so far."""
    num_dead: list[int]
    """For each group, leading entries that were given back."""
    num_registered: list[int]
    """For each group, leading blocks that need not be made findable any more."""
    num_source_tokens: int = 0
    """Tokens that the model's encoder makes of what the request brings."""
    source_hashes: list[bytes] = field(default_factory=list)
    """Of the blocks that the encoder fills, for the smallest block size of such groups."""
    has_shared_source: bool = False
    """Whether an earlier request's encoder has filled those blocks already."""
    num_settled: int = 0
    """Leading blocks, of the smallest block size, that are no longer announced."""
    capacity: int = 0
    """Tokens up to which no group needs another block."""
    next_settle_at: int = NEVER
    """Computed tokens at which another block is full, so that the manager wants to know."""
    is_findable: bool = False
    """Whether blocks that fill become findable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixHit:
    """Blocks that hold the first tokens of a request already. Good until the pools change."""

    num_tokens: int
    block_ids: list[list[int]]
    """For each group, a table that reaches `num_tokens`."""
    num_pending_tokens: int = 0
    """The tokens after these that another request is computing now: to wait saves their work."""


@dataclass(slots=True, kw_only=True)
class PrefixCacheStatistics:
    """How often the prefix cache helped, since the start."""

    num_requests: int = 0
    """Admissions that looked."""
    num_query_tokens: int = 0
    num_hit_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Hit tokens for each queried token."""
        return self.num_hit_tokens / self.num_query_tokens if self.num_query_tokens else 0.0
