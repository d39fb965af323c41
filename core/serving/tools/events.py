"""The parts of an answer, in the order in which they become certain."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model thinks aloud."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """What the model says."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPart:
    """A tool call, or the next piece of its arguments."""

    index: int
    """Of the call in the answer."""
    id: str | None = None
    """None: a piece of a call that has begun."""
    name: str | None = None
    arguments: str = ""
    """JSON, or a piece of it."""


Part = Reasoning | Content | CallPart


class AnswerParser(Protocol):
    """Takes an answer's text in pieces and gives its parts.

    However the text is cut, the parts put together are the same. What cannot be read is text;
    nothing is ever raised. One parser serves one answer.
    """

    def feed(self, text: str) -> list[Part]:
        """What is certain by now and was not said before."""
        ...

    def finish(self) -> list[Part]:
        """What was held back; the answer has ended."""
        ...


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One whole call."""

    name: str
    arguments: str
    """JSON."""
    id: str | None = None
    """As the model gave it; None: the server makes one."""


@dataclass(slots=True)
class ParsedAnswer:
    """An answer, whole."""

    content: str | None = None
    reasoning: str | None = None
    calls: list[ToolCall] | None = None


def join(parts: Sequence[Part]) -> ParsedAnswer:
    """The parts of one answer put together."""
    answer = ParsedAnswer()
    calls: dict[int, ToolCall] = {}
    for part in parts:
        match part:
            case Reasoning(text):
                answer.reasoning = (answer.reasoning or "") + text
            case Content(text):
                answer.content = (answer.content or "") + text
            case CallPart():
                known = calls.get(part.index) or ToolCall("", "")
                calls[part.index] = ToolCall(
                    known.name + (part.name or ""),
                    known.arguments + part.arguments,
                    known.id or part.id,
                )
    answer.calls = [calls[index] for index in sorted(calls)] or None
    return answer


def parse_whole(parser: AnswerParser, text: str) -> ParsedAnswer:
    """The parts of a whole answer."""
    return join([*parser.feed(text), *parser.finish()])


def new_call_id() -> str:
    """As the OpenAI API has them."""
    return f"call_{secrets.token_hex(12)}"


def short_call_id() -> str:
    """Nine letters and digits, which the templates of some models insist on."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def as_json(value: Any) -> str:
    """Arguments as JSON."""
    return json.dumps(value, ensure_ascii=False)


def read_call(value: Any) -> ToolCall | None:
    """A call of `{"name": ..., "arguments": {...}}`, which some models spell differently."""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = read_json(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, as_json(arguments))


def read_json(text: str) -> Any:
    """The value, or None for what is no JSON."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
