"""How the memory is divided between the cache groups."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.core.errors import ConfigError
from quire.core.interface.worker import CacheGroup
from quire.core.kv_cache.group_policy import make_group_policy
from quire.core.kv_cache.sizing import plan_cache


def group(window=None, block_size=16, bytes_per_block=1000):
    return CacheGroup(
        name=f"g{window}",
        kind="causal" if window is None else "sliding_window",
        window=window,
        block_size=block_size,
        num_layers=1,
        bytes_per_block=bytes_per_block,
    )


def plan(groups, budget, *, length=160, seqs=4, batched=32):
    return plan_cache(
        groups,
        budget_bytes=budget,
        max_model_len=length,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
    ).num_blocks


def blocks_of_one(groups, length, batched):
    return [make_group_policy(one).max_held_blocks(length, batched) for one in groups]


groups_strategy = st.lists(
    st.builds(
        group,
        window=st.none() | st.integers(1, 300),
        block_size=st.integers(1, 32),
        bytes_per_block=st.integers(1, 5000),
    ),
    min_size=1,
    max_size=3,
)


def test_plan_of_one_group_fills_the_budget():
    """What is not planned is wasted; the null block is paid for."""
    assert plan([group()], 35_500) == [35]


def test_plan_is_capped_at_what_can_be_of_use():
    """A small model on a large device leaves memory to others."""
    assert plan([group()], 10**12) == [1 + 2 * 4 * 10]


def test_window_group_gets_blocks_for_window_and_chunk_only():
    """Layers with a window are why hybrid models fit longer contexts."""
    full, sliding = plan([group(), group(window=33)], 10**9, length=1600)
    assert full == 1 + 8 * 100
    assert sliding == 1 + 8 * 5


@given(groups_strategy, st.integers(1, 500), st.integers(1, 64), st.integers(1, 10**6))
def test_plan_keeps_the_budget_and_holds_as_many_requests_in_each_group(
    groups, length, batched, budget
):
    """The budget is a promise; a group with room for fewer requests than another wastes the other's memory."""
    try:
        num_blocks = plan(groups, budget, length=length, batched=batched)
    except ConfigError:
        return
    assert sum(n * one.bytes_per_block for n, one in zip(num_blocks, groups, strict=True)) <= budget
    needs = blocks_of_one(groups, length, batched)
    rooms = [(count - 1) // need for count, need in zip(num_blocks, needs, strict=True)]
    assert min(rooms) >= 1
    shares = [(count - 1) / need for count, need in zip(num_blocks, needs, strict=True)]
    assert max(shares) - min(shares) <= 1
    assert max(shares) <= 2 * 4


@given(groups_strategy, st.integers(1, 400), st.integers(1, 64), st.integers(0, 10**5))
def test_refused_plan_names_the_longest_length_that_fits(groups, length, batched, budget):
    """The advice works, and no longer length would."""
    try:
        plan(groups, budget, length=length, batched=batched)
        return
    except ConfigError as error:
        message = str(error)
    assert f"max_model_len {length} " in message
    assert f"there are {budget:,}" in message
    advised = re.search(r"at most (\d+)", message)
    longest = int(advised[1]) if advised else 0
    if longest:
        plan(groups, budget, length=longest, batched=batched)
    with pytest.raises(ConfigError):
        plan(groups, budget, length=longest + 1, batched=batched)


def test_refused_plan_names_the_bytes_that_are_needed():
    """With exactly these bytes it fits."""
    with pytest.raises(ConfigError, match="needs 11,000 bytes; there are 10,999") as caught:
        plan([group()], 10_999)
    assert "max_model_len to at most 144" in str(caught.value)
    assert plan([group()], 11_000) == [11]


def test_budget_that_holds_no_block_says_so():
    """No length is advised where none fits."""
    with pytest.raises(ConfigError, match="no request fits at all"):
        plan([group()], 1500)
