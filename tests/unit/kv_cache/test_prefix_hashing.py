"""Hashes of blocks: the same everywhere, different for whatever differs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.core.kv_cache.prefix_hashing import hash_blocks, root_hash

tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_hash_of_known_tokens_is_the_same_in_every_process():
    """Caches outside the process and routers rely on it: a change of these digests is a change of format."""
    assert root_hash(None).hex()[:16] == "ee5683f8aad8eab5"
    assert [h.hex()[:16] for h in hash_blocks([1, 2, 3, 4, 5], 2, root_hash("s"))] == [
        "d0be47d53ece7e38",
        "9a0d7954d7725032",
    ]


def test_hash_covers_full_blocks_only():
    """A block that is not full will hold other tokens later."""
    assert len(hash_blocks([1, 2, 3], 2, b"")) == 1
    assert hash_blocks([1], 2, b"") == []


@given(tokens, st.integers(1, 5), st.integers(0, 8))
def test_hashing_in_parts_equals_hashing_at_once(token_ids, block_size, num_first):
    """Blocks are hashed as they fill."""
    root = root_hash(None)
    whole = hash_blocks(token_ids, block_size, root)
    cut = min(num_first, len(whole))
    rest = hash_blocks(token_ids[cut * block_size :], block_size, whole[cut - 1] if cut else root)
    assert whole[:cut] + rest == whole


@given(tokens, tokens, st.integers(1, 4))
def test_hashes_are_equal_exactly_as_far_as_tokens_are(first, second, block_size):
    """Equal hash means equal tokens from the start, and the other way round."""
    root = root_hash(None)
    pairs = zip(
        hash_blocks(first, block_size, root), hash_blocks(second, block_size, root), strict=False
    )
    for number, (one, other) in enumerate(pairs, 1):
        end = number * block_size
        assert (one == other) == (first[:end] == second[:end])


def test_roots_differ_by_salt_and_by_keys():
    """No two tenants, adapters or images share a block; no salt is not an empty salt."""
    roots = [
        root_hash(None),
        root_hash(""),
        root_hash("a"),
        root_hash(None, ["a"]),
        root_hash("a", ["a"]),
        root_hash(None, ["a", "b"]),
        root_hash(None, ["ab"]),
        root_hash(None, ["", "ab"]),
    ]
    assert len(set(roots)) == len(roots)
