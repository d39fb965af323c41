"""Calls that a grammar guarantees: their arguments can be told as they come."""

from __future__ import annotations

import json
import re

from quire.core.serving.tools.events import CallPart, Part, new_call_id

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"parameters"\s*:\s*')


class NamedCallParser:
    """The whole answer is the arguments of one tool."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        if not text:
            return []
        if self._has_begun:
            return [CallPart(index=0, arguments=text)]
        self._has_begun = True
        return [CallPart(index=0, id=new_call_id(), name=self._name, arguments=text)]

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        return []


class CallListParser:
    """`[{"name": ..., "parameters": {...}}, ...]`, cut off at most at its end."""

    def __init__(self) -> None:
        self._buffer = ""
        self._index = -1
        self._depth = 0
        self._is_in_string = self._is_escaped = self._is_in_arguments = False

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        self._buffer += text
        parts: list[Part] = []
        while self._arguments(parts) if self._is_in_arguments else self._head(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        return []

    def _head(self, parts: list[Part]) -> bool:
        """Looks for the next call. What stands between two of them says nothing."""
        begin = self._buffer.find("{")
        if begin < 0:
            self._buffer = ""
            return False
        head = _HEAD.match(self._buffer, begin)
        if head is None or head.end() == len(self._buffer):
            return False
        self._index += 1
        self._buffer = self._buffer[head.end() :]
        self._is_in_arguments, self._depth = True, 0
        name = _unescaped(head.group(1))
        parts.append(CallPart(index=self._index, id=new_call_id(), name=name))
        return True

    def _arguments(self, parts: list[Part]) -> bool:
        """Tells the arguments up to the brace that closes them."""
        for at, character in enumerate(self._buffer):
            if self._ends_with(character):
                self._tell(at + 1, parts)
                self._is_in_arguments = False
                # The brace of the call itself; it stands before any that opens the next one.
                return True
        self._tell(len(self._buffer), parts)
        return False

    def _tell(self, size: int, parts: list[Part]) -> None:
        told, self._buffer = self._buffer[:size], self._buffer[size:]
        if told:
            parts.append(CallPart(index=self._index, arguments=told))

    def _ends_with(self, character: str) -> bool:
        if self._is_in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_in_string = False
        elif character == '"':
            self._is_in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False


def _unescaped(text: str) -> str:
    return str(json.loads(f'"{text}"'))
