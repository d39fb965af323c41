"""What is looked up in a request's own text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.core.scheduler.guessing import LONGEST, SHORTEST, PromptLookup


def slow_guess(text, limit):
    """Looks through the whole text for the last place of its last tokens, the longest run first."""
    for size in range(min(LONGEST, len(text)), SHORTEST - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == text[-size:]:
                return text[end : end + limit]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6), st.data())
def test_guess_equals_a_search_through_the_whole_text(text, limit, data):
    """However the text grew, step by step or at once."""
    lookup = PromptLookup()
    for length in sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=6))):
        assert lookup.guess(text[:length], limit) == slow_guess(text[:length], limit)
    assert lookup.guess(text, limit) == slow_guess(text, limit)
