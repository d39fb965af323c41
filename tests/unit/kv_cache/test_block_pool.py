"""The pool of block ids, beside a model that keeps a plain list."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quire.core.interface.worker import NULL_BLOCK
from quire.core.kv_cache.block_pool import BlockPool


def test_fresh_pool_gives_every_block_but_the_null_block():
    """Block 0 takes what padding writes, so nobody may own it."""
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    assert pool.num_usable == 4


def test_allocate_more_than_free_is_a_fault_of_ours():
    """The manager looks before it takes; a pool never gives half."""
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="3 blocks of 2"):
        pool.allocate(3)
    assert pool.num_free == 2


def test_shared_block_is_free_after_its_last_holder():
    """A prefix stays while anybody reads it."""
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.share(block)
    pool.free([block])
    assert pool.num_free == 0
    pool.check_integrity({block: 1})
    pool.free([block])
    assert pool.num_free == 1
    pool.check_integrity({})


def test_free_of_a_free_block_is_refused():
    """A block that is freed twice would soon belong to two requests."""
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.free([block])
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.free([block])


def test_freed_block_with_hash_is_found_until_it_is_given_out():
    """That is the prefix cache."""
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.register(block, b"h")
    pool.free([block])
    assert pool.find(b"h") == block
    assert pool.num_cached == 1
    pool.allocate(1)
    assert pool.find(b"h") is None
    pool.check_integrity({block: 1})


def test_freed_block_with_hash_can_be_taken_back():
    """A hit on a free block takes it out of the free list."""
    pool = BlockPool(3)
    [block] = pool.allocate(1)
    pool.register(block, b"h")
    pool.free([block])
    pool.share(block)
    assert pool.num_free == 1
    assert pool.allocate(1) != [block]
    pool.check_integrity({1: 1, 2: 1})


def test_eviction_takes_blocks_without_hash_first_then_the_oldest():
    """What nobody can find is worth nothing; of the rest, what was used last stays longest."""
    pool = BlockPool(5)
    a, b, c, d = pool.allocate(4)
    for block, name in ((a, b"a"), (b, b"b"), (d, b"d")):
        pool.register(block, name)
    pool.free([d])
    pool.free([b])
    pool.free([c])
    pool.free([a])
    assert pool.allocate(4) == [c, d, b, a]


def test_second_block_of_the_same_tokens_is_not_registered():
    """Two requests may compute the same block at once; one of them is found, the other is plain."""
    pool = BlockPool(3)
    first, second = pool.allocate(2)
    pool.register(first, b"h")
    pool.register(second, b"h")
    assert pool.find(b"h") == first
    pool.free([first, second])
    assert pool.allocate(1) == [second]
    pool.check_integrity({second: 1})


def test_forget_hashes_makes_all_unfindable_and_frees_nothing():
    """After a change of weights old keys are wrong, yet those who run still hold theirs."""
    pool = BlockPool(3)
    held, freed = pool.allocate(2)
    pool.register(held, b"1")
    pool.register(freed, b"2")
    pool.free([freed])
    pool.forget_hashes()
    assert (pool.find(b"1"), pool.find(b"2"), pool.num_free) == (None, None, 1)
    pool.check_integrity({held: 1})


class PoolMachine(RuleBasedStateMachine):
    """Any order of calls, beside the obvious model: who holds what, and the free ones in a list."""

    NUM_BLOCKS = 7

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(self.NUM_BLOCKS)
        self.held: list[int] = []
        self.free_order = list(range(1, self.NUM_BLOCKS))
        self.hashes: dict[int, bytes] = {}

    @rule(count=st.integers(0, 3))
    def allocate(self, count):
        if count > len(self.free_order):
            return
        expected = [self.free_order.pop(0) for _ in range(count)]
        for block in expected:
            self.hashes.pop(block, None)
        assert self.pool.allocate(count) == expected
        self.held += expected

    @precondition(lambda self: self.held or self.hashes)
    @rule(data=st.data())
    def share(self, data):
        block = data.draw(st.sampled_from(sorted({*self.held, *self.hashes})))
        self.pool.share(block)
        self.held.append(block)
        if block in self.free_order:
            self.free_order.remove(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        count = data.draw(st.integers(1, len(self.held)))
        blocks = data.draw(st.permutations(self.held))[:count]
        self.pool.free(blocks)
        for block in blocks:
            self.held.remove(block)
            if block not in self.held:
                place = len(self.free_order) if block in self.hashes else 0
                self.free_order.insert(place, block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, data, name):
        block = data.draw(st.sampled_from(self.held))
        self.pool.register(block, name)
        if block not in self.hashes and name not in self.hashes.values():
            self.hashes[block] = name

    @rule()
    def forget(self):
        self.pool.forget_hashes()
        self.hashes.clear()

    @invariant()
    def agrees(self):
        assert self.pool.num_free == len(self.free_order)
        assert self.pool.num_cached == len(self.hashes)
        assert NULL_BLOCK not in self.held
        for block in range(1, self.NUM_BLOCKS):
            assert self.pool.is_held(block) == (block in self.held)
        for block, name in self.hashes.items():
            assert self.pool.find(name) == block
        self.pool.check_integrity({block: self.held.count(block) for block in self.held})


class TestPoolMachine(PoolMachine.TestCase):
    settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
