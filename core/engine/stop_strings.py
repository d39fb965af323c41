"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on up to the first stop string, whatever the pieces it arrives in.

    The end of the text that could begin a stop string is held back until it is certain. The
    first stop string is the one that ends first; of several that end there, the longest.
    """

    __slots__ = ("_beginnings", "_held", "_is_included", "_max_held", "_stops")

    def __init__(self, stops: Sequence[str], *, is_included: bool = False) -> None:
        """`is_included`: the stop string itself is passed on too."""
        self._stops = tuple(stops)
        self._is_included = is_included
        self._beginnings = frozenset(stop[:end] for stop in stops for end in range(1, len(stop)))
        self._max_held = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""

    def feed(self, delta: str) -> tuple[str, str | None]:
        """Takes more text.

        Returns what is certain now and, at the end, the stop string that was found.
        """
        text = self._held + delta
        found = self._first_stop(text)
        if found is not None:
            end, stop = found
            self._held = ""
            return text[: end if self._is_included else end - len(stop)], stop
        start = len(text) - self._num_uncertain(text)
        self._held = text[start:]
        return text[:start], None

    def flush(self) -> str:
        """What was held back; the output ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        ends = [
            (start + len(stop), -len(stop), stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if not ends:
            return None
        end, _, stop = min(ends)
        return end, stop

    def _num_uncertain(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        beginnings = self._beginnings
        for length in range(min(self._max_held, len(text)), 0, -1):
            if text[-length:] in beginnings:
                return length
        return 0
