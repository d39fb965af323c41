"""The cache manager, rule by rule."""

from __future__ import annotations

import pytest

from quire.core.interface.worker import NULL_BLOCK, CacheGroup, CachePlan
from quire.core.kv_cache.block_table import NEVER
from quire.core.kv_cache.manager import KVCacheManager


def group(window=None, block_size=4):
    return CacheGroup(
        name=f"g{window}",
        kind="causal" if window is None else "sliding_window",
        window=window,
        block_size=block_size,
        num_layers=1,
        bytes_per_block=1,
    )


def manager(*windows, num_blocks=(21,), block_size=4, **options):
    groups = [group(window, block_size) for window in windows or (None,)]
    plan = CachePlan(num_blocks=list(num_blocks) * (len(groups) // len(num_blocks)))
    return KVCacheManager(groups, plan, **options)


def run(cache, tokens, *, salt=None, chunk=None):
    """Brings a request into the cache and computes all of it; returns its table and its hit."""
    table = cache.make_table(salt)
    hit = cache.find_prefix(table, tokens)
    start = hit.num_tokens
    first = min(chunk or len(tokens), len(tokens) - start)
    assert cache.admit(table, hit, num_tokens=len(tokens), num_new_tokens=first)
    done = start + first
    cache.settle(table, tokens, done)
    while done < len(tokens):
        step = min(chunk, len(tokens) - done)
        assert cache.allocate(table, done + step) is not None
        done += step
        cache.settle(table, tokens, done)
        cache.check_integrity()
    cache.check_integrity()
    return table, hit


def test_prefix_of_a_finished_request_is_found():
    """A system prompt is computed once."""
    cache = manager()
    table, _ = run(cache, list(range(10)))
    blocks = table.block_ids[0][:2]
    cache.free(table)
    _, hit = run(cache, [*range(8), 99, 98])
    assert (hit.num_tokens, hit.block_ids) == (8, [blocks])


def test_prefix_of_a_running_request_is_shared():
    """Blocks have as many references as tables that hold them."""
    cache = manager()
    first, _ = run(cache, list(range(9)))
    second, _ = run(cache, list(range(9)))
    assert first.block_ids[0][:2] == second.block_ids[0][:2]
    assert cache.num_free_blocks == [20 - 4]
    cache.free(first)
    cache.check_integrity({second})
    assert cache.num_free_blocks == [20 - 3]


def test_hit_leaves_at_least_one_token_to_compute():
    """Without one the step would have nothing to sample from."""
    cache = manager()
    cache.free(run(cache, list(range(8)))[0])
    assert run(cache, list(range(8)))[1].num_tokens == 4


def test_prefix_is_not_shared_across_salts():
    """A tenant cannot learn from the time of an answer what another one asked."""
    cache = manager()
    cache.free(run(cache, list(range(9)), salt="a")[0])
    assert run(cache, list(range(9)), salt="b")[1].num_tokens == 0
    assert run(cache, list(range(9)))[1].num_tokens == 0
    assert run(cache, list(range(9)), salt="a")[1].num_tokens == 8


def test_blocks_are_found_only_once_their_contents_are_written():
    """A step that is scheduled may still fail."""
    cache = manager()
    tokens = list(range(9))
    table = cache.make_table()
    assert cache.admit(table, cache.find_prefix(table, tokens), num_tokens=9, num_new_tokens=9)
    other = cache.make_table()
    assert cache.find_prefix(other, tokens).num_tokens == 0
    cache.settle(table, tokens, 5)
    assert cache.find_prefix(other, tokens).num_tokens == 4
    cache.settle(table, tokens, 9)
    assert cache.find_prefix(other, tokens).num_tokens == 8


def test_prefix_that_is_being_computed_is_announced_until_it_is_there_or_never_comes():
    """Who needs the same prefix may wait for it, and must not wait for nothing."""
    cache = manager()
    tokens = list(range(13))
    table = cache.make_table()
    assert cache.admit(table, cache.find_prefix(table, tokens), num_tokens=13, num_new_tokens=13)
    other = cache.make_table()
    longer = [*tokens, 50, 51, 52]
    assert cache.find_prefix(other, longer).num_pending_tokens == 12
    assert cache.find_prefix(cache.make_table(), [*range(6), *longer]).num_pending_tokens == 4
    assert cache.find_prefix(cache.make_table("salt"), longer).num_pending_tokens == 0
    cache.settle(table, tokens, 6)
    hit = cache.find_prefix(other, longer)
    assert (hit.num_tokens, hit.num_pending_tokens) == (4, 8)
    assert len(cache._announced) == 2
    cache.free(table)
    hit = cache.find_prefix(other, longer)
    assert (hit.num_tokens, hit.num_pending_tokens) == (4, 0)
    cache.check_integrity()


def test_reset_forgets_the_past_and_what_running_requests_still_fill():
    """After a change of weights no old key may be found, nor one that builds on old keys."""
    cache = manager()
    tokens = list(range(13))
    table = cache.make_table()
    assert cache.admit(table, cache.find_prefix(table, tokens), num_tokens=13, num_new_tokens=5)
    past, _ = run(cache, [99] * 9)
    cache.reset_prefix_cache()
    assert cache.find_prefix(cache.make_table(), [99] * 9).num_tokens == 0
    assert cache.find_prefix(cache.make_table(), tokens).num_pending_tokens == 0
    cache.settle(table, tokens, 13)
    assert cache.find_prefix(cache.make_table(), tokens).num_tokens == 0
    cache.free(table)
    cache.free(past)
    assert run(cache, tokens)[1].num_tokens == 0
    assert run(cache, tokens)[1].num_tokens == 12


def test_distrusted_blocks_are_found_by_nobody_and_still_held():
    """What broke a request may lie in its blocks; others keep what they hold of them."""
    cache = manager()
    tokens = list(range(12))
    other, _ = run(cache, tokens)
    broken, hit = run(cache, [*tokens[:8], 50, 51, 52, 53, 54])
    assert hit.num_tokens == 8
    cache.distrust(broken)
    cache.settle(broken, [*tokens[:8], 50, 51, 52, 53, 54, 55, 56, 57], 16)
    cache.check_integrity({other, broken})
    assert cache.find_prefix(cache.make_table(), [*tokens, 99]).num_tokens == 0
    cache.free(broken)
    cache.check_integrity({other})
    cache.free(other)
    assert run(cache, [*tokens, 99])[1].num_tokens == 0
    cache.check_integrity()


def test_tail_is_evicted_before_the_head():
    """The head of a prompt serves more requests than its tail."""
    cache = manager(num_blocks=(6,))
    cache.free(run(cache, list(range(20)))[0])
    run(cache, [77] * 8)
    assert cache.find_prefix(cache.make_table(), list(range(20))).num_tokens == 12


def test_prefix_caching_off_finds_nothing_and_asks_for_nothing():
    """The scheduler need not even call."""
    cache = manager(enable_prefix_caching=False)
    table = cache.make_table()
    assert cache.admit(table, cache.no_prefix(), num_tokens=9, num_new_tokens=9)
    assert table.next_settle_at == NEVER
    cache.free(table)
    assert cache.find_prefix(cache.make_table(), list(range(9))).num_tokens == 0
    assert cache.prefix_statistics.num_requests == 0


def test_admission_counts_blocks_of_the_hit_that_nobody_holds():
    """A free block of the prefix is taken out of the free ones, a held one is not."""
    cache = manager(num_blocks=(5,))
    cache.free(run(cache, list(range(9)))[0])
    tokens = [*range(8), *[50] * 9]
    table = cache.make_table()
    hit = cache.find_prefix(table, tokens)
    assert hit.num_tokens == 8
    assert not cache.admit(table, hit, num_tokens=17, num_new_tokens=9)
    assert cache.num_free_blocks == [4]
    assert cache.admit(table, hit, num_tokens=16, num_new_tokens=8)
    cache.check_integrity({table})


def test_admission_leaves_spare_blocks():
    """Those who run can go on."""
    cache = manager(num_blocks=(5,))
    table = cache.make_table()
    hit = cache.no_prefix()
    assert not cache.admit(table, hit, num_tokens=12, num_new_tokens=12, num_spare_blocks=2)
    assert cache.admit(table, hit, num_tokens=12, num_new_tokens=12, num_spare_blocks=1)


def test_admission_asks_for_room_for_the_whole_prompt():
    """A prompt of which only the first chunk fits waits."""
    cache = manager(num_blocks=(5,))
    table = cache.make_table()
    assert not cache.admit(table, cache.no_prefix(), num_tokens=17, num_new_tokens=4)
    assert cache.admit(table, cache.no_prefix(), num_tokens=16, num_new_tokens=4)
    assert table.capacity == 16


def test_allocation_takes_nothing_if_one_group_lacks_blocks():
    """All or nothing, or the blocks of one group would leak away bit by bit."""
    cache = manager(None, 100, num_blocks=(9, 4))
    table = cache.make_table()
    assert cache.admit(table, cache.no_prefix(), num_tokens=12, num_new_tokens=12)
    assert cache.allocate(table, 13) is None
    assert cache.num_free_blocks == [5, 0]
    assert [len(block_ids) for block_ids in table.block_ids] == [3, 3]
    cache.check_integrity({table})


def test_window_gives_blocks_back_as_it_moves():
    """A request of any length holds no more than window and chunk."""
    cache = manager(6, num_blocks=(5,))
    table, _ = run(cache, list(range(60)), chunk=4)
    assert table.block_ids[0][:13] == [NULL_BLOCK] * 13
    assert cache.num_free_blocks == [2]
    assert cache.can_ever_hold(1000, max_chunk=4)
    assert not cache.can_ever_hold(1000, max_chunk=12)


def test_window_moves_without_prefix_caching_too():
    """Giving blocks back and finding them again are two things."""
    cache = manager(6, num_blocks=(5,), enable_prefix_caching=False)
    table, _ = run(cache, list(range(60)), chunk=4)
    assert table.next_settle_at == 64
    assert cache.num_free_blocks == [2]


def test_admission_to_a_window_asks_for_window_and_chunk():
    """The second chunk must not find that the first one was all there was room for."""
    cache = manager(6, num_blocks=(4,))
    table = cache.make_table()
    assert not cache.admit(table, cache.no_prefix(), num_tokens=40, num_new_tokens=8)
    assert cache.admit(table, cache.no_prefix(), num_tokens=40, num_new_tokens=3)


def test_window_hit_needs_only_the_blocks_of_the_last_window():
    """Blocks that were evicted long before the window are not missed."""
    cache = manager(6, num_blocks=(8,))
    tokens = list(range(24))
    cache.free(run(cache, tokens, chunk=4)[0])
    _, hit = run(cache, [*tokens, 5], chunk=4)
    assert hit.num_tokens == 24
    assert hit.block_ids[0][:4] == [NULL_BLOCK] * 4
    assert NULL_BLOCK not in hit.block_ids[0][4:]


def test_groups_agree_on_the_longest_common_hit():
    """What only one group still has is of no use."""
    cache = manager(None, 6, num_blocks=(30, 8))
    tokens = list(range(24))
    cache.free(run(cache, tokens, chunk=4)[0])
    assert cache.find_prefix(cache.make_table(), [*tokens, 5]).num_tokens == 24
    cache._pools[0].allocate(cache._pools[0].num_free - 4)
    hit = cache.find_prefix(cache.make_table(), [*tokens, 5])
    assert hit.num_tokens < 24
    for shared in hit.block_ids:
        assert len(shared) == hit.num_tokens // 4


def test_groups_of_different_block_sizes_agree_on_common_boundaries():
    """Six tokens are a boundary of blocks of two and of three."""
    groups = [group(None, 2), group(None, 3)]
    cache = KVCacheManager(groups, CachePlan(num_blocks=[30, 30]))
    cache.free(run(cache, list(range(12)))[0])
    hit = cache.find_prefix(cache.make_table(), list(range(11)))
    assert hit.num_tokens == 6
    assert [len(shared) for shared in hit.block_ids] == [3, 2]


def test_output_blocks_are_found_by_the_next_turn_of_a_conversation():
    """The answer is part of the next prompt."""
    cache = manager()
    tokens = [1, 2, 3]
    table, _ = run(cache, tokens)
    for token in range(10, 17):
        tokens.append(token)
        if len(tokens) > table.capacity:
            assert cache.allocate(table, len(tokens)) is not None
        if len(tokens) >= table.next_settle_at:
            cache.settle(table, tokens, len(tokens))
        cache.check_integrity({table})
    cache.free(table)
    assert run(cache, [*tokens, 20])[1].num_tokens == 8


def test_statistics_count_queried_and_hit_tokens():
    """Each admission counts once."""
    cache = manager()
    cache.free(run(cache, list(range(9)))[0])
    run(cache, list(range(11)))
    statistics = cache.prefix_statistics
    assert (statistics.num_requests, statistics.num_query_tokens) == (2, 20)
    assert statistics.num_hit_tokens == 8
    assert statistics.hit_rate == pytest.approx(0.4)


def test_usage_is_that_of_the_fullest_group():
    """The group that runs out first decides."""
    cache = manager(None, 100, num_blocks=(11, 6))
    run(cache, list(range(8)))
    assert cache.usage == pytest.approx(0.4)


def test_free_twice_is_harmless():
    """A request may end in more than one way at once."""
    cache = manager()
    table, _ = run(cache, list(range(9)))
    cache.free(table)
    cache.free(table)
    cache.check_integrity(set())
    assert cache.num_free_blocks == [20]


def test_integrity_check_finds_a_leaked_table():
    """A check that cannot fail protects nothing."""
    cache = manager()
    run(cache, list(range(9)))
    with pytest.raises(AssertionError, match="leaked"):
        cache.check_integrity(set())


def test_integrity_check_finds_a_block_in_two_places():
    """Two requests that write to one block ruin each other."""
    cache = manager()
    first, _ = run(cache, list(range(9)))
    second, _ = run(cache, [9] * 9)
    second.block_ids[0][0] = first.block_ids[0][0]
    with pytest.raises(AssertionError, match="references"):
        cache.check_integrity()
