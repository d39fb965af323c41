"""The block ids of one cache group: which are free, which are shared, and what each holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from quire.core.interface.worker import NULL_BLOCK


class BlockPool:
    """Block ids 1 to num_blocks - 1 with reference counts; block 0 is never given out.

    A block that was freed keeps its hash and can be found and shared again until it is given out
    anew. The free list is therefore also the order of eviction: blocks that nobody can find go
    first, then those that were freed longest ago. Every operation is O(1) a block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_usable(self) -> int:
        """Blocks that can be given out at all."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, those with a hash included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that a prefix can find, held or free."""
        return len(self._block_of_hash)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, each with one reference; what they held is forgotten.

        The caller has looked at `num_free`: asking for more is a fault of ours.
        """
        free, references, hashes = self._free, self._num_references, self._hashes
        assert count <= len(free), f"asked for {count} blocks of {len(free)} free"
        blocks = []
        for _ in range(count):
            block = free.popitem(last=False)[0]
            block_hash = hashes[block]
            if block_hash is not None:
                del self._block_of_hash[block_hash]
                hashes[block] = None
            references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, block: int) -> None:
        """Adds a reference to a block that is held, or free with a hash."""
        if self._num_references[block] == 0:
            del self._free[block]
        self._num_references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Drops one reference of each block. The first that becomes free is the first to go."""
        free, references = self._free, self._num_references
        for block in blocks:
            count = references[block] - 1
            assert count >= 0, f"block {block} is freed but nobody holds it"
            references[block] = count
            if count == 0:
                free[block] = None
                if self._hashes[block] is None:
                    free.move_to_end(block, last=False)

    def is_held(self, block: int) -> bool:
        """Whether anybody holds the block."""
        return self._num_references[block] > 0

    def find(self, block_hash: bytes) -> int | None:
        """The block that holds the tokens of a hash, held or free."""
        return self._block_of_hash.get(block_hash)

    def register(self, block: int, block_hash: bytes) -> None:
        """Says what a held block holds now. The first block of a hash stays the one found."""
        if self._hashes[block] is None and block_hash not in self._block_of_hash:
            self._hashes[block] = block_hash
            self._block_of_hash[block_hash] = block

    def forget(self, block: int) -> None:
        """Makes one block unfindable; who holds it keeps it."""
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._block_of_hash[block_hash]
            self._hashes[block] = None

    def forget_hashes(self) -> None:
        """Makes every block unfindable; who holds what stays as it is."""
        for block in self._block_of_hash.values():
            self._hashes[block] = None
        self._block_of_hash.clear()

    def check_integrity(self, num_holders: dict[int, int]) -> None:
        """Recomputes the pool from the number of tables that hold each block.

        Raises: AssertionError that names what is wrong.
        """
        assert NULL_BLOCK not in self._free, "the null block is free"
        assert self._num_references[NULL_BLOCK] == 0, "somebody holds the null block"
        for block in range(1, self.num_blocks):
            references, holders = self._num_references[block], num_holders.get(block, 0)
            assert references == holders, (
                f"block {block}: {references} references, {holders} tables"
            )
            is_free = block in self._free
            assert is_free == (references == 0), (
                f"block {block}: free {is_free}, {references} references"
            )
        assert len(self._free) == sum(count == 0 for count in self._num_references[1:])
        hashed = {block: known for block, known in enumerate(self._hashes) if known is not None}
        found = {block: known for known, block in self._block_of_hash.items()}
        assert hashed == found, f"hashes of blocks {hashed.keys() ^ found.keys()} disagree"
        assert len(found) == len(self._block_of_hash), "a block is found under two hashes"
