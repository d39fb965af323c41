"""Answers in which marks begin and end each tool call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from quire.core.serving.tools.argument_stream import (
    MIN_STREAMED,
    MakeReader,
    ObjectReader,
    ToldCall,
    is_long,
)
from quire.core.serving.tools.events import CallPart, Content, Part, ToolCall, new_call_id

ReadCalls = Callable[[str], list[ToolCall] | None]
"""What stands between the marks, as calls; None: it is no call, but text."""


@dataclass(frozen=True, slots=True)
class Region:
    """Where calls stand."""

    begin: str
    end: str | None
    """None: the end of the answer."""
    read: ReadCalls
    is_json: bool = True
    """An end within a JSON string is none."""
    head: re.Pattern[str] | None = None
    """What stands before arguments, with the groups `name` (or `newer`) and perhaps `id`; long
    ones are then told as they come. None: a call is told whole.
    """
    make_reader: MakeReader = ObjectReader
    """For the arguments behind `head`."""


class ContentTrimmer:
    """Leaves out white space beside tool calls, and numbers the calls."""

    def __init__(
        self, *, is_parallel: bool = True, make_id: Callable[[], str] = new_call_id
    ) -> None:
        self._is_parallel = is_parallel
        self._make_id = make_id
        self._held = ""
        self._has_spoken = False
        """Since the last call."""
        self._num_calls = 0

    def text(self, text: str) -> list[Part]:
        """Text, without white space that may turn out to stand beside a call."""
        whole = self._held + text
        if self._num_calls and not self._has_spoken:
            whole = whole.lstrip()
        said = whole.rstrip()
        self._held = whole[len(said) :]
        self._has_spoken = self._has_spoken or bool(said)
        return [Content(said)] if said else []

    def calls(self, calls: Sequence[ToolCall]) -> list[Part]:
        """Calls; where only one is wanted, the first."""
        self._held, self._has_spoken = "", False
        parts: list[Part] = []
        for call in calls:
            if self._num_calls and not self._is_parallel:
                break
            parts.append(
                CallPart(
                    index=self._num_calls,
                    id=call.id or self._make_id(),
                    name=call.name,
                    arguments=call.arguments,
                )
            )
            self._num_calls += 1
        return parts

    def begin_call(self, name: str, call_id: str | None, parts: list[Part]) -> int | None:
        """Begins a call whose arguments come in pieces; its index, or None if it is one too many.

        Adds to `parts`.
        """
        begun = self.calls([ToolCall(name, "", call_id)])
        parts += begun
        return begun[0].index if begun and isinstance(begun[0], CallPart) else None

    def finish(self) -> list[Part]:
        """White space at the end of an answer that is not a call."""
        held, self._held = self._held, ""
        return [Content(held)] if held and (self._has_spoken or not self._num_calls) else []


class MarkedParser:
    """Text and regions."""

    def __init__(
        self, regions: Sequence[Region], trimmer: ContentTrimmer, *, noise: Iterable[str] = ()
    ) -> None:
        """`noise`: marks that mean nothing by themselves and are left out."""
        self._regions = {region.begin: region for region in regions}
        self._noise = frozenset(noise)
        self._marks = (*self._regions, *self._noise)
        self._trimmer = trimmer
        self._buffer = ""
        self._region: Region | None = None
        self._searched = 0
        self._telling: ToldCall | None = None
        """Whose arguments are being told."""
        self._is_told = False
        """The call of this region; what follows up to its end says nothing."""

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        self._buffer += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        parts: list[Part] = []
        if self._region is not None:
            region, self._region = self._region, None
            body, self._buffer = self._buffer, ""
            if self._telling is None and not self._is_told:
                parts += self._close(region, body, region.end is None)
        parts += self._trimmer.text(self._buffer)
        self._buffer = ""
        return parts + self._trimmer.finish()

    def _advance(self, parts: list[Part]) -> bool:
        """One step through the buffer; whether there may be another."""
        if self._region is not None:
            return self._advance_region(self._region, parts)
        begin, mark = find_first(self._buffer, self._marks)
        if mark is None:
            safe = len(self._buffer) - held_back(self._buffer, self._marks)
            parts += self._trimmer.text(self._buffer[:safe])
            self._buffer = self._buffer[safe:]
            return False
        parts += self._trimmer.text(self._buffer[:begin])
        self._buffer = self._buffer[begin + len(mark) :]
        self._region = self._regions.get(mark)
        self._searched = 0
        self._is_told = False
        return True

    def _advance_region(self, region: Region, parts: list[Part]) -> bool:
        if self._telling is not None:
            return self._tell(self._telling, region, parts)
        if not self._is_told and self._begin_telling(region, parts):
            return True
        if region.end is None:
            return False
        end = self._buffer.find(region.end, self._searched)
        if end < 0:
            self._searched = max(self._searched, len(self._buffer) - len(region.end) + 1)
            return False
        body = self._buffer[:end]
        if (
            not self._is_told
            and region.is_json
            and is_in_string(body)
            and region.read(body) is None
        ):
            self._searched = end + len(region.end)
            return True
        self._buffer = self._buffer[end + len(region.end) :]
        self._region = None
        if not self._is_told:
            parts += self._close(region, body, is_whole=True)
        return True

    def _begin_telling(self, region: Region, parts: list[Part]) -> bool:
        """Whether a call begins whose arguments are so long that they are told as they come."""
        head = region.head.match(self._buffer) if region.head is not None else None
        if head is None:
            return False
        found = head.groupdict()
        name, call_id = (found["name"] or found["newer"]).strip(), found.get("id")
        text = self._buffer[head.end() :]
        is_over = not region.is_json and region.end and region.end in text[:MIN_STREAMED]
        if is_over or not is_long(text, region.make_reader(name)):
            return False
        index = self._trimmer.begin_call(name, call_id and call_id.strip(), parts)
        self._telling = ToldCall(index, region.make_reader(name))
        self._buffer = text
        return True

    def _tell(self, call: ToldCall, region: Region, parts: list[Part]) -> bool:
        parts += call.feed(self._buffer)
        self._buffer = call.rest or ""
        if call.rest is None:
            return False
        self._telling, self._is_told, self._searched = None, True, 0
        if region.end is None:
            self._region = None
        return True

    def _close(self, region: Region, body: str, is_whole: bool) -> list[Part]:
        calls = region.read(body) if is_whole else None
        if calls:
            return self._trimmer.calls(calls)
        end = region.end if is_whole and region.end is not None else ""
        return self._trimmer.text(region.begin + body + end)


def find_first(text: str, marks: Iterable[str]) -> tuple[int, str | None]:
    """The first of the marks in a text, and where it begins; of two there, the longer."""
    found = [(at, -len(mark), mark) for mark in marks if (at := text.find(mark)) >= 0]
    if not found:
        return len(text), None
    at, _, mark = min(found)
    return at, mark


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end could be the beginning of a mark."""
    longest = max((len(mark) for mark in marks), default=1)
    for size in range(min(longest - 1, len(text)), 0, -1):
        tail = text[-size:]
        if any(mark.startswith(tail) for mark in marks):
            return size
    return 0


def is_in_string(text: str) -> bool:
    """Whether a JSON text ends within a string."""
    is_inside = is_escaped = False
    for character in text:
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = is_inside
        elif character == '"':
            is_inside = not is_inside
    return is_inside
