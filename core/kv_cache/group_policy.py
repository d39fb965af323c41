"""What a kind of attention needs of its blocks: one small object for each kind.

The manager knows no kinds; it asks these questions. A new kind answers them in a class of its own
and enters `make_group_policy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from quire.core.errors import UnsupportedError
from quire.core.interface.errors import Reason
from quire.core.interface.worker import CacheGroup
from quire.core.kv_cache.block_pool import BlockPool


class GroupPolicy(ABC):
    """How the requests of one cache group use blocks of `block_size` tokens."""

    gives_back_early: bool
    """Whether blocks go back while the request runs."""
    follows_tokens = True
    """Whether blocks follow the request's own tokens, or what it brought for an encoder."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    @abstractmethod
    def num_dead_blocks(self, num_computed: int) -> int:
        """Leading blocks of a table that no token from position `num_computed` on can see."""

    @abstractmethod
    def num_admission_blocks(self, num_tokens: int, chunk_end: int) -> int:
        """The length of the table of a request that starts with `num_tokens`.

        Its first step ends at `chunk_end`. To take more at once keeps a prompt that was begun from
        waiting for blocks half-way.
        """

    @abstractmethod
    def max_held_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """The most blocks that a request holds at once on its way to `num_tokens`.

        No step of it is longer than `max_chunk`.
        """

    @abstractmethod
    def longest_hit(self, pool: BlockPool, hashes: Sequence[bytes], max_blocks: int) -> int:
        """The longest prefix, in blocks, after which a request could go on with what the pool has.

        At most `max_blocks`; `hashes` has one for each of these.
        """

    def num_blocks(self, num_tokens: int) -> int:
        """The length of a table that reaches `num_tokens`."""
        return -(-num_tokens // self.block_size)


class FullPolicy(GroupPolicy):
    """Every token sees all before it: nothing goes back, a prefix is contiguous from the start.

    Serves causal attention and the latent cache of MLA alike.
    """

    gives_back_early = False

    def num_dead_blocks(self, num_computed: int) -> int:
        """None, ever."""
        return 0

    def num_admission_blocks(self, num_tokens: int, chunk_end: int) -> int:
        """All of them."""
        return self.num_blocks(num_tokens)

    def max_held_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """As many as there are tokens for."""
        return self.num_blocks(num_tokens)

    def longest_hit(self, pool: BlockPool, hashes: Sequence[bytes], max_blocks: int) -> int:
        """The blocks up to the first that is missing."""
        find = pool.find
        for index in range(max_blocks):
            if find(hashes[index]) is None:
                return index
        return max_blocks


class SlidingWindowPolicy(GroupPolicy):
    """Position p sees j with p - window < j <= p: blocks behind the window are given back."""

    gives_back_early = True

    def __init__(self, block_size: int, window: int) -> None:
        super().__init__(block_size)
        self.window = window

    def num_dead_blocks(self, num_computed: int) -> int:
        """Blocks that end before the first position that the next token sees."""
        return max(0, num_computed - self.window + 1) // self.block_size

    def num_admission_blocks(self, num_tokens: int, chunk_end: int) -> int:
        """Those of the first step: later ones come as earlier ones go."""
        return self.num_blocks(chunk_end)

    def max_held_blocks(self, num_tokens: int, max_chunk: int) -> int:
        """The window and a chunk, wherever they lie across the blocks."""
        span = self.window - 1 + min(max_chunk, num_tokens)
        return min(self.num_blocks(num_tokens), self.num_blocks(span) + 1)

    def longest_hit(self, pool: BlockPool, hashes: Sequence[bytes], max_blocks: int) -> int:
        """The last place before which the blocks of a window are all there; others need not be."""
        needed = self.num_blocks(self.window - 1)
        num_found = 0
        for index in range(max_blocks - 1, -1, -1):
            if num_found >= needed:
                return index + 1 + num_found
            num_found = num_found + 1 if pool.find(hashes[index]) is not None else 0
        return num_found


class RecurrentPolicy(SlidingWindowPolicy):
    """A block holds the state after its last token, so a token needs the block before it alone.

    That is a window of two tokens; a prefix ends where a whole block's state is kept.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size, window=2)


class CrossPolicy(FullPolicy):
    """Blocks for what an encoder made of the request's source: all at once, and never more.

    Where others are asked about a request's tokens, this one is asked about its source's.
    """

    follows_tokens = False

    def __init__(self, block_size: int, max_source_tokens: int) -> None:
        super().__init__(block_size)
        self.max_source_tokens = max_source_tokens


def make_group_policy(group: CacheGroup) -> GroupPolicy:
    """The policy of a group's kind.

    Raises: UnsupportedError for a kind that the cache does not know.
    """
    # Chunks could go back as windows do; keeping them is right, and takes more memory.
    if group.kind in ("causal", "mla", "chunked"):
        return FullPolicy(group.block_size)
    if group.kind == "recurrent":
        return RecurrentPolicy(group.block_size)
    if group.kind == "cross" and group.max_tokens is not None:
        return CrossPolicy(group.block_size, group.max_tokens)
    if group.kind == "sliding_window" and group.window is not None:
        return SlidingWindowPolicy(group.block_size, group.window)
    reason = Reason(
        code="kv_cache.kind",
        need=f"blocks for attention of kind {group.kind!r}, window {group.window}",
        have="causal, chunked, cross, mla, recurrent, and sliding_window with a window",
        remedy="serve a model without such layers",
    )
    raise UnsupportedError([reason], what=f"cache group {group.name!r}")
