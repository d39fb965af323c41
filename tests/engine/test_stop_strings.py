"""Stop strings are found across pieces, exactly."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.engine.stop_strings import StopFilter

LETTERS = st.text(alphabet="ab<", max_size=24)
STOPS = st.lists(st.text(alphabet="ab<", min_size=1, max_size=5), min_size=1, max_size=3)


def slow_model(text: str, stops: list[str], *, is_included: bool) -> tuple[str, str | None]:
    """Letter by letter: the first moment at which the text ends with a stop string, the longest of them."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if is_included else end - len(stop)], stop
    return text, None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


@settings(max_examples=500, deadline=None)
@given(text=LETTERS, stops=STOPS, cuts=st.lists(st.integers(0, 24)), is_included=st.booleans())
def test_feed_any_pieces_stop_at_the_same_place(text, stops, cuts, is_included):
    """How tokens cut the text decides nothing; what was passed on is never taken back."""
    stop_filter = StopFilter(stops, is_included=is_included)
    passed, stop = "", None
    for piece in pieces_of(text, cuts):
        certain, stop = stop_filter.feed(piece)
        passed += certain
        if stop is not None:
            break
    else:
        passed += stop_filter.flush()
    assert (passed, stop) == slow_model(text, stops, is_included=is_included)


@settings(max_examples=200, deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_feed_holds_back_only_what_could_begin_a_stop(text, stops):
    """A stream is not delayed by more than it must be."""
    stop_filter = StopFilter(stops)
    certain, stop = stop_filter.feed(text)
    if stop is None:
        held = stop_filter.flush()
        assert certain + held == text
        assert not held or any(stop.startswith(held) for stop in stops)
