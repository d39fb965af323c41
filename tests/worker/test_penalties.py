"""The tokens that a request has seen, counted as they come."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from quire.core.worker.penalties import SeenTokens

TOKENS = st.lists(st.integers(0, 300), max_size=200)


@given(TOKENS, TOKENS, TOKENS)
def test_seen_tokens_any_history_equals_counter(prompt, output, more):
    """Counting token by token, over any growth of the arrays, is counting the whole."""
    seen = SeenTokens(prompt, output)
    for token in more:
        seen.append(token)
    counts = Counter(output + more)
    expected = {token: counts[token] for token in {*prompt, *output, *more}}
    ids = seen.token_ids.tolist()
    assert len(set(ids)) == len(ids)
    assert dict(zip(ids, seen.output_counts.tolist(), strict=True)) == expected
