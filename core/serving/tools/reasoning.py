"""Thoughts before the answer, between two marks."""

from __future__ import annotations

from quire.core.serving.tools.events import AnswerParser, Content, Part, Reasoning
from quire.core.serving.tools.marked import held_back


class PlainParser:
    """All is text."""

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        return [Content(text)] if text else []

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        return []


class ReasoningParser:
    """Splits thoughts off and hands the rest to another parser."""

    def __init__(self, begin: str, end: str, inner: AnswerParser, *, is_inside: bool) -> None:
        """`is_inside`: the prompt has opened the thoughts already."""
        self._begin = begin
        self._end = end
        self._inner = inner
        self._is_inside = is_inside
        self._may_begin = True
        self._is_after = False
        self._trims = False
        self._buffer = ""

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        self._buffer += text
        parts: list[Part] = []
        if self._may_begin and not self._see_beginning():
            return parts
        if self._is_inside:
            parts += self._think()
        if not self._is_inside:
            parts += self._answer()
        return parts

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        rest, self._buffer = self._buffer, ""
        if self._is_inside:
            return [*([Reasoning(rest)] if rest else []), *self._inner.finish()]
        return [*(self._inner.feed(rest) if rest else []), *self._inner.finish()]

    def _see_beginning(self) -> bool:
        """Takes the opening mark away; False: it is not certain yet whether there is one."""
        rest = self._buffer.lstrip()
        if rest.startswith(self._begin):
            self._buffer = rest[len(self._begin) :]
            self._is_inside = True
        elif self._begin.startswith(rest) and self._begin != rest:
            return False
        self._may_begin = False
        return True

    def _think(self) -> list[Part]:
        at = self._buffer.find(self._end)
        if at < 0:
            size = len(self._buffer) - held_back(self._buffer, (self._end,))
            said, self._buffer = self._buffer[:size], self._buffer[size:]
        else:
            said, self._buffer = self._buffer[:at], self._buffer[at + len(self._end) :]
            self._is_inside, self._trims = False, True
        return [Reasoning(said)] if said else []

    def _answer(self) -> list[Part]:
        if self._trims:
            self._buffer = self._buffer.lstrip()
            self._trims = not self._buffer
        text, self._buffer = self._buffer, ""
        return self._inner.feed(text) if text else []


def is_open(prompt: str, begin: str, end: str) -> bool | None:
    """Whether a prompt ends within thoughts; None: it says nothing of them at its end."""
    tail = prompt.rstrip()
    if tail.endswith(begin):
        return True
    if tail.endswith(end):
        return False
    return None
