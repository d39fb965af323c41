"""Answers that are calls from their first character on, without marks around them."""

from __future__ import annotations

import re
from collections.abc import Callable

from quire.core.serving.tools.argument_stream import (
    LLAMA_HEAD,
    ObjectEnd,
    ObjectReader,
    ToldCall,
    is_long,
)
from quire.core.serving.tools.events import Content, Part, ToolCall, read_call, read_json
from quire.core.serving.tools.marked import ContentTrimmer
from quire.core.serving.tools.python_calls import read_python_calls


class BareParser:
    """Holds an answer back as long as it could be calls; text goes out as soon as it is text."""

    def __init__(
        self,
        could_be: Callable[[str], bool],
        read: Callable[[str], list[ToolCall] | None],
        trimmer: ContentTrimmer,
    ) -> None:
        self._could_be = could_be
        self._read = read
        self._trimmer = trimmer
        self._buffer = ""
        self._is_text = False

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        if self._is_text:
            return [Content(text)] if text else []
        self._buffer += text
        if self._could_be(self._buffer):
            return []
        self._is_text = True
        held, self._buffer = self._buffer, ""
        return [Content(held)] if held else []

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        if self._is_text or not self._buffer:
            return []
        calls = self._read(self._buffer)
        if calls:
            return self._trimmer.calls(calls)
        return [Content(self._buffer)]


class LlamaParser:
    """`{"name": ..., "parameters": {...}}`, several behind `;`.

    Long parameters go out as they come; what stands behind their call is then read by itself.
    """

    def __init__(self, trimmer: ContentTrimmer) -> None:
        self._trimmer = trimmer
        self._held = BareParser(could_be_llama_json, read_llama_json, trimmer)
        """Reads answers without long parameters."""
        self._buffer = ""
        self._is_held = False
        """The answer is read by `_held`."""
        self._has_told = False
        self._telling: ToldCall | None = None
        self._call_end: ObjectEnd | None = None
        """Of the call whose parameters have been told."""

    def feed(self, text: str) -> list[Part]:
        """See `AnswerParser`."""
        if self._is_held:
            return self._held.feed(text)
        self._buffer += text
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """See `AnswerParser`."""
        if self._is_held:
            return self._held.finish()
        rest, self._buffer = self._buffer, ""
        if not self._has_told:
            return [*self._held.feed(rest), *self._held.finish()]
        rest = rest.strip().removeprefix(";").strip()
        calls = read_llama_json(rest) if rest else None
        if calls:
            return self._trimmer.calls(calls)
        return [*self._trimmer.text(rest), *self._trimmer.finish()]

    def _advance(self, parts: list[Part]) -> bool:
        """One step through the buffer; whether there may be another."""
        if self._telling is not None:
            return self._tell(self._telling, parts)
        if self._call_end is not None:
            return self._skip(self._call_end)
        begin = _BETWEEN.match(self._buffer) if self._has_told else None
        head = LLAMA_HEAD.match(self._buffer, begin.end() if begin is not None else 0)
        if head is not None and is_long(self._buffer[head.end() :], ObjectReader()):
            index = self._trimmer.begin_call(head["name"], None, parts)
            self._telling, self._has_told = ToldCall(index, ObjectReader()), True
            self._buffer = self._buffer[head.end() :]
            return True
        if not self._has_told and not could_be_llama_json(self._buffer):
            self._is_held = True
            parts += self._held.feed(self._buffer)
        return False

    def _tell(self, call: ToldCall, parts: list[Part]) -> bool:
        parts += call.feed(self._buffer)
        self._buffer = call.rest or ""
        if call.rest is None:
            return False
        self._telling, self._call_end = None, ObjectEnd(depth=1)
        return True

    def _skip(self, call: ObjectEnd) -> bool:
        end = call.find(self._buffer)
        self._buffer = "" if end is None else self._buffer[end:]
        if end is None:
            return False
        self._call_end = None
        return True


_BETWEEN = re.compile(r"\s*;?")
_LLAMA_BEGIN = re.compile(r"\s*(?:<\|python_tag\|>)?\s*\{\s*\"(?:name|type|function|parameters)\"")
_LLAMA_STEPS = ("<|python_tag|>",)


def could_be_llama_json(text: str) -> bool:
    """Whether a text begins like a JSON object that names a tool."""
    rest = text.lstrip()
    tag = _LLAMA_STEPS[0]
    if not rest or tag.startswith(rest):
        return True
    rest = rest.removeprefix(tag).lstrip()
    if not rest:
        return True
    if _LLAMA_BEGIN.match(rest):
        return True
    return re.fullmatch(r"\{\s*(?:\"\w{0,10})?", rest) is not None and _is_key_prefix(rest)


def _is_key_prefix(text: str) -> bool:
    _, quote, key = text.partition('"')
    names = ("name", "type", "function", "parameters")
    return not quote or any(name.startswith(key) for name in names)


def read_llama_json(text: str) -> list[ToolCall] | None:
    """`{"name": ..., "parameters": {...}}`, several behind `;`."""
    rest = text.strip().removeprefix("<|python_tag|>").strip()
    calls = []
    for piece in _objects(rest):
        call = read_call(read_json(piece))
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _objects(text: str) -> list[str]:
    """The pieces of a text between semicolons that stand outside of objects."""
    pieces, start, depth, is_inside, is_escaped = [], 0, 0, False, False
    for at, character in enumerate(text):
        if is_escaped:
            is_escaped = False
        elif is_inside:
            is_escaped = character == "\\"
            is_inside = character != '"'
        elif character == '"':
            is_inside = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
        elif character == ";" and depth == 0:
            pieces.append(text[start:at])
            start = at + 1
    return [piece for piece in (*pieces, text[start:]) if piece.strip()]


_PYTHON_HEAD = re.compile(r"\[\s*(?:[A-Za-z_][\w.]*\s*(?:\(.*)?)?", re.DOTALL)
_PYTHON_START = "<|python_start|>"
_PYTHON_END = "<|python_end|>"


def could_be_python(text: str) -> bool:
    """Whether a text begins like a list of calls."""
    rest = text.lstrip()
    if _PYTHON_START.startswith(rest):
        return True
    rest = rest.removeprefix(_PYTHON_START).lstrip()
    return not rest or _PYTHON_HEAD.fullmatch(rest) is not None


def read_pythonic(text: str) -> list[ToolCall] | None:
    """`[name(key=1), ...]`."""
    rest = text.strip().removeprefix(_PYTHON_START).removesuffix(_PYTHON_END)
    return read_python_calls(rest)
