"""How many blocks each cache group gets of the memory there is."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.errors import ConfigError
from quire.core.interface.worker import CacheGroup, CachePlan
from quire.core.kv_cache.group_policy import make_group_policy

USEFUL_SHARE = 2
"""Times max_num_seqs full requests: what runs, and as much again for prefixes worth keeping."""


def plan_cache(
    groups: Sequence[CacheGroup],
    *,
    budget_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> CachePlan:
    """Divides the budget so that all groups have room for the same number of full requests.

    Never more than is of use, and never more than the budget.
    Raises: ConfigError if not one such request fits; it says what is missing and what would fit.
    """
    request_blocks = _blocks_of_request(groups, max_model_len, max_num_batched_tokens)
    null_bytes = sum(group.bytes_per_block for group in groups)
    request_bytes = _total_bytes(groups, request_blocks)
    if request_bytes + null_bytes > budget_bytes:
        fitting = _longest_that_fits(groups, budget_bytes, max_model_len, max_num_batched_tokens)
        raise ConfigError(
            _too_small(request_bytes + null_bytes, budget_bytes, max_model_len, fitting)
        )
    # Whole numbers: for tebibytes of cache a float would round the wrong way.
    usable = min(budget_bytes - null_bytes, USEFUL_SHARE * max_num_seqs * request_bytes)
    return CachePlan(num_blocks=[1 + count * usable // request_bytes for count in request_blocks])


def _blocks_of_request(
    groups: Sequence[CacheGroup], num_tokens: int, max_num_batched_tokens: int
) -> list[int]:
    return [
        make_group_policy(group).max_held_blocks(
            num_tokens if group.max_tokens is None else group.max_tokens, max_num_batched_tokens
        )
        for group in groups
    ]


def _total_bytes(groups: Sequence[CacheGroup], num_blocks: Sequence[int]) -> int:
    return sum(
        count * group.bytes_per_block for count, group in zip(num_blocks, groups, strict=True)
    )


def _longest_that_fits(
    groups: Sequence[CacheGroup], budget_bytes: int, too_long: int, max_num_batched_tokens: int
) -> int:
    """The most tokens of one request that the budget holds, below `too_long`; 0 if none."""
    fits, fails = 0, too_long
    while fails - fits > 1:
        middle = (fits + fails) // 2
        blocks = _blocks_of_request(groups, middle, max_num_batched_tokens)
        needed = _total_bytes(groups, [1 + count for count in blocks])
        fits, fails = (middle, fails) if needed <= budget_bytes else (fits, middle)
    return fits


def _too_small(needed: int, budget: int, max_model_len: int, fitting: int) -> str:
    advice = (
        f"set max_model_len to at most {fitting}, or give the cache more memory "
        "(device_memory_fraction, cache_memory_bytes)"
        if fitting
        else "no request fits at all; give the cache more memory (device_memory_fraction, "
        "cache_memory_bytes)"
    )
    return (
        f"the KV cache of one request of max_model_len {max_model_len} needs {needed:,} bytes; "
        f"there are {budget:,}; {advice}"
    )
