"""The channels of GPT-OSS: thoughts, calls and the answer, each a message of its own.

<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f
<|constrain|>json<|message|>{...}<|call|>

Source: the harmony response format.
"""

from __future__ import annotations

import re

from quire.core.serving.tools.argument_stream import MIN_STREAMED, ObjectReader, is_long
from quire.core.serving.tools.events import (
    CallPart,
    Content,
    Part,
    Reasoning,
    ToolCall,
    as_json,
    read_json,
)
from quire.core.serving.tools.marked import ContentTrimmer, find_first, held_back

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_HEADER_MARKS = ("<|start|>", "<|channel|>")


class HarmonyParser:
    """Messages, one after the other. Text outside of any is an answer's text."""

    def __init__(self, trimmer: ContentTrimmer, *, has_tools: bool = True) -> None:
        self._trimmer = trimmer
        self._has_tools = has_tools
        self._buffer = ""
        self._header: str | None = None
        """Of the message that is read; None: between messages."""
        self._is_message = False
        self._is_told = False
        """The message is a call, whose arguments go out as they come."""
        self._index: int | None = None
        """Of that call; None: it is one too many."""

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        self._buffer += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        rest, self._buffer = self._buffer, ""
        parts: list[Part] = []
        if self._header is None:
            parts += _content(rest)
        elif not self._is_message:
            parts += _content(self._header + rest)
        else:
            parts += self._close(rest)
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        if self._header is None:
            return self._between(parts)
        if not self._is_message:
            return self._read_header()
        return self._read_message(parts)

    def _between(self, parts: list[Part]) -> bool:
        at, mark = find_first(self._buffer, (*_HEADER_MARKS, *_ENDS))
        if mark is None:
            size = len(self._buffer) - held_back(self._buffer, (*_HEADER_MARKS, *_ENDS))
            parts += _content(self._buffer[:size])
            self._buffer = self._buffer[size:]
            return False
        parts += _content(self._buffer[:at])
        self._buffer = self._buffer[at + len(mark) :]
        if mark in _HEADER_MARKS:
            self._header, self._is_message = mark, False
        return True

    def _read_header(self) -> bool:
        at = self._buffer.find(_MESSAGE)
        if at < 0:
            return False
        assert self._header is not None
        self._header += self._buffer[:at]
        self._buffer = self._buffer[at + len(_MESSAGE) :]
        self._is_message = True
        return True

    def _read_message(self, parts: list[Part]) -> bool:
        at, mark = find_first(self._buffer, _ENDS)
        if not self._is_told and at >= MIN_STREAMED:
            size = at if mark is not None else at - held_back(self._buffer, _ENDS)
            self._begin_telling(self._buffer[:size], parts)
        if mark is None:
            if self._is_told or self._tool() is None:
                size = len(self._buffer) - held_back(self._buffer, _ENDS)
                parts += self._say(self._buffer[:size])
                self._buffer = self._buffer[size:]
            return False
        body, self._buffer = self._buffer[:at], self._buffer[at + len(mark) :]
        parts += self._close(body)
        self._header = mark if mark in _HEADER_MARKS else None
        self._is_message = self._is_told = False
        return True

    def _begin_telling(self, body: str, parts: list[Part]) -> None:
        """Begins the call that the message is, if its arguments are long."""
        name = self._tool()
        if name is None or not is_long(body.lstrip(), ObjectReader()):
            return
        self._index = self._trimmer.begin_call(name, None, parts)
        self._is_told = True

    def _close(self, body: str) -> list[Part]:
        """The rest of a message, or the call that it is."""
        name = self._tool()
        if name is None or self._is_told:
            return self._say(body)
        arguments = read_json(body) if body.strip() else {}
        if not isinstance(arguments, dict):
            return _content(body)
        return self._trimmer.calls([ToolCall(name, as_json(arguments))])

    def _say(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._is_told:
            return [] if self._index is None else [CallPart(index=self._index, arguments=text)]
        is_thought = "<|channel|>analysis" in (self._header or "")
        return [Reasoning(text)] if is_thought else [Content(text)]

    def _tool(self) -> str | None:
        found = re.search(r"to=(?:functions\.)?([\w.-]+)", self._header or "")
        return found.group(1) if found is not None and self._has_tools else None


def _content(text: str) -> list[Part]:
    return [Content(text)] if text else []
