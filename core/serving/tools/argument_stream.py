"""The arguments of a call that are told while they are written."""

from __future__ import annotations

import re

from pydantic_core import from_json

MIN_STREAMED = 64
"""Arguments shorter than this come whole, so that what turns out to be none can become text."""


class ObjectEnd:
    """Finds where a JSON object ends, in pieces."""

    def __init__(self) -> None:
        self._depth = 0
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


def is_long_object(text: str) -> bool:
    """Whether a text begins like a JSON object that is long enough to be told in pieces."""
    begin = text[:MIN_STREAMED]
    if len(begin) < MIN_STREAMED or ObjectEnd().find(begin) is not None:
        return False
    try:
        value = from_json(begin, allow_partial="trailing-strings", allow_inf_nan=False)
    except ValueError:
        return False
    return isinstance(value, dict)


_NAME = r'"(?P<name>[^"\\]+)"'
JSON_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*{_NAME}\s*,\s*"arguments"\s*:\s*(?=\{{)')
"""Hermes, Qwen."""
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
