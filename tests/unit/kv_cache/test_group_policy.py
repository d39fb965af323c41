"""What the kinds of attention need of their blocks, beside a model that looks at every position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import UnsupportedError
from quire.core.interface.worker import CacheGroup
from quire.core.kv_cache.block_pool import BlockPool
from quire.core.kv_cache.group_policy import (
    FullPolicy,
    RecurrentPolicy,
    SlidingWindowPolicy,
    make_group_policy,
)

sizes = st.integers(1, 5)
windows = st.integers(1, 12)


def group(kind, window=None):
    return CacheGroup(
        name="g", kind=kind, window=window, block_size=4, num_layers=1, bytes_per_block=1
    )


def visible(position, window):
    """The positions that a token sees."""
    first = 0 if window is None else max(0, position - window + 1)
    return range(first, position + 1)


def policy_of(block_size, window):
    return FullPolicy(block_size) if window is None else SlidingWindowPolicy(block_size, window)


@given(sizes, st.none() | windows, st.integers(0, 40))
def test_dead_blocks_are_those_that_no_later_token_sees(block_size, window, num_computed):
    """One too many, and attention reads what another request wrote; one too few, and memory lies idle."""
    policy = policy_of(block_size, window)
    seen = set(visible(num_computed, window))
    dead = 0
    while (dead + 1) * block_size <= num_computed and not seen & set(
        range(dead * block_size, (dead + 1) * block_size)
    ):
        dead += 1
    assert policy.num_dead_blocks(num_computed) == dead


@given(sizes, st.none() | windows, st.lists(st.booleans(), max_size=12))
def test_longest_hit_is_the_last_place_from_which_all_that_is_seen_is_there(
    block_size, window, present
):
    """The hit is right and none longer would be."""
    pool = BlockPool(len(present) + 1)
    hashes = [bytes([index]) for index in range(len(present))]
    for block, name, is_there in zip(pool.allocate(len(present)), hashes, present, strict=True):
        if is_there:
            pool.register(block, name)
    good = [
        length
        for length in range(len(present) + 1)
        if all(
            position // block_size >= length or present[position // block_size]
            for position in visible(length * block_size, window)
        )
    ]
    assert policy_of(block_size, window).longest_hit(pool, hashes, len(present)) == max(good)


@given(sizes, st.none() | windows, st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_held_blocks_never_exceed_what_sizing_counts_on(block_size, window, chunks):
    """Else a request that was promised room would not fit when it is alone."""
    policy = policy_of(block_size, window)
    num_computed, most = 0, 0
    for chunk in chunks:
        held = policy.num_blocks(num_computed + chunk) - policy.num_dead_blocks(num_computed)
        most = max(most, held)
        num_computed += chunk
    assert most <= policy.max_held_blocks(num_computed, max(chunks))


@given(windows, sizes, st.integers(1, 9))
def test_held_blocks_of_a_long_request_come_close_to_the_bound(window, block_size, chunk):
    """The bound wastes at most one block."""
    policy = SlidingWindowPolicy(block_size, window)
    held = [
        policy.num_blocks(done + chunk) - policy.num_dead_blocks(done)
        for done in range(200, 200 + block_size)
    ]
    assert policy.max_held_blocks(1000, chunk) - 1 <= max(held)


def test_full_attention_takes_the_whole_prompt_at_admission():
    """A prompt that was begun does not wait for blocks half-way; a window takes as it goes."""
    assert FullPolicy(4).num_admission_blocks(40, 8) == 10
    assert SlidingWindowPolicy(4, 8).num_admission_blocks(40, 8) == 2


@pytest.mark.parametrize("kind", ["causal", "mla"])
def test_latent_cache_behaves_as_full_attention(kind):
    """MLA keeps other contents, not other blocks."""
    assert isinstance(make_group_policy(group(kind)), FullPolicy)


@pytest.mark.parametrize(
    ("kind", "window"), [("cross", None), ("vendor:x", 3), ("sliding_window", None)]
)
def test_unknown_kind_is_refused_with_the_reason(kind, window):
    """A kind that nobody taught the cache must not run as if it were another."""
    with pytest.raises(UnsupportedError, match=f"{kind}.*window {window}"):
        make_group_policy(group(kind, window))


@given(sizes, st.integers(1, 40))
def test_state_of_the_token_before_is_never_dead(block_size, num_computed):
    """A recurrent layer goes on from the block of the last computed token, and needs no other."""
    policy = RecurrentPolicy(block_size)
    assert policy.num_dead_blocks(num_computed) == (num_computed - 1) // block_size
