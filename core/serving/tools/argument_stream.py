"""The arguments of a call that are told while they are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from pydantic_core import from_json

from quire.core.serving.tools.events import CallPart, Part

MIN_STREAMED = 64
"""Arguments shorter than this come whole, so that what turns out to be none can become text."""


class ArgumentReader(Protocol):
    """Turns arguments, as a model writes them, into JSON.

    What has come decides what is said, not how it was cut.
    """

    rest: str | None
    """What stands behind the arguments; None: they have not ended."""

    def feed(self, text: str) -> str:
        """The JSON that is certain by now and was not said before."""
        ...

    def begins(self, text: str) -> bool:
        """Whether a text begins like arguments and is not the whole of them.

        Asked of a new reader, which is then used up.
        """
        ...


MakeReader = Callable[[str], ArgumentReader]
"""Makes the reader for the tool of a name."""


class ObjectEnd:
    """Finds where a JSON object ends, in pieces."""

    def __init__(self, depth: int = 0) -> None:
        """`depth`: of the braces that are open already."""
        self._depth = depth
        self._is_inside = self._is_escaped = False

    def find(self, text: str) -> int | None:
        """How many characters of the next piece belong to the object; None: all, and more."""
        for at, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_inside:
                self._is_escaped = character == "\\"
                self._is_inside = character != '"'
            elif character == '"':
                self._is_inside = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        return None


class ObjectReader:
    """Arguments that are JSON already."""

    def __init__(self, _name: str = "") -> None:
        """See `MakeReader`."""
        self._end = ObjectEnd()
        self.rest: str | None = None

    def feed(self, text: str) -> str:
        """See `ArgumentReader`."""
        size = self._end.find(text)
        if size is None:
            return text
        self.rest = text[size:]
        return text[:size]

    def begins(self, text: str) -> bool:
        """See `ArgumentReader`."""
        self.feed(text)
        if self.rest is not None:
            return False
        try:
            value = from_json(text, allow_partial="trailing-strings", allow_inf_nan=False)
        except ValueError:
            return False
        return isinstance(value, dict)


def is_long(text: str, reader: ArgumentReader) -> bool:
    """Whether a text begins like arguments that are long enough to be told in pieces.

    `reader` is used up.
    """
    return len(text) >= MIN_STREAMED and reader.begins(text[:MIN_STREAMED])


class ToldCall:
    """A call whose arguments go out as they come."""

    def __init__(self, index: int | None, arguments: ArgumentReader) -> None:
        """`index`: of the call; None: it is one too many, and nothing is told."""
        self._index = index
        self._arguments = arguments

    @property
    def rest(self) -> str | None:
        """What stands behind the arguments; None: they have not ended."""
        return self._arguments.rest

    def feed(self, text: str) -> list[Part]:
        """The next piece of the arguments."""
        told = self._arguments.feed(text)
        if not told or self._index is None:
            return []
        return [CallPart(index=self._index, arguments=told)]


_NAME = r'"(?P<name>[^"\\]+)"'
JSON_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{_NAME}\s*,\s*"arguments"\s*:\s*(?=\{{)')
"""Hermes, Qwen."""
LLAMA_HEAD = re.compile(
    r"\s*(?:<\|python_tag\|>)?\s*\{\s*"
    r'(?:"type"\s*:\s*"function"\s*,\s*)?'
    rf'"name"\s*:\s*{_NAME}\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{{)'
)
"""Llama."""
DEEPSEEK_HEAD = re.compile(
    r"\s*(?:[^\n`{<]*<｜tool▁sep｜>(?P<name>[^\n`{]+?)\s*```(?:json)?\s*"
    r"|(?P<newer>[^\n`{<]+?)\s*<｜tool▁sep｜>\s*)(?=\{)"
)
"""V3: the name behind the separator; V3.1: before it."""
KIMI_HEAD = re.compile(
    r"(?P<id>\s*(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*)"
    r"<\|tool_call_argument_begin\|>\s*(?=\{)"
)
MISTRAL_HEAD = re.compile(
    r"\s*(?:\[TOOL_CALLS\])?\s*(?P<name>[\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*(?=\{)"
)
QWEN_CODER_HEAD = re.compile(r"\s*<function=(?P<name>[^<>\n]+)>")
GLM_HEAD = re.compile(r"\s*(?P<name>[\w.-]+)\s*")
GEMMA_HEAD = re.compile(r"\s*call:(?P<name>[\w.-]+)(?=\{)")
