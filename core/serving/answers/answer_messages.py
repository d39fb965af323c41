"""The assistant's turn of a chat answer, made of what the model said."""

from __future__ import annotations

from collections.abc import Callable

from quire.core.serving.protocol.chat import AnswerMessage, ChatRequest
from quire.core.serving.protocol.tools import CallBody, CallFunction
from quire.core.serving.tools.events import (
    AnswerParser,
    CallPart,
    Content,
    Part,
    Reasoning,
    parse_whole,
)

MakeParser = Callable[[], AnswerParser]


def whole_message(
    text: str, make_parser: MakeParser | None, request: ChatRequest
) -> tuple[AnswerMessage, bool]:
    """The whole turn, and whether it calls tools."""
    if make_parser is None:
        return AnswerMessage(role="assistant", content=text, refusal=None), False
    answer = parse_whole(make_parser(), text)
    calls = [
        CallBody(
            id=call.id,
            type="function",
            function=CallFunction(name=call.name, arguments=call.arguments),
        )
        for call in answer.calls or ()
    ]
    content = answer.content if answer.content is not None or calls else ""
    message = AnswerMessage(role="assistant", content=content, refusal=None)
    if answer.reasoning is not None and request.include_reasoning is not False:
        message.reasoning_content = message.reasoning = answer.reasoning
    if calls:
        message.tool_calls = calls
    return message, bool(calls)


class DeltaReader:
    """Makes deltas of one answer that comes in pieces."""

    def __init__(self, make_parser: MakeParser | None, request: ChatRequest) -> None:
        self._parser = None if make_parser is None else make_parser()
        self._shows_reasoning = request.include_reasoning is not False
        self.has_called = False
        """Whether a tool was called by now."""

    def read(self, text: str, *, is_last: bool) -> AnswerMessage | None:
        """What was added; None: nothing that could be told."""
        if self._parser is None:
            return AnswerMessage(content=text) if text else None
        parts = self._parser.feed(text)
        if is_last:
            parts += self._parser.finish()
        return self._delta(parts)

    def _delta(self, parts: list[Part]) -> AnswerMessage | None:
        content = "".join(part.text for part in parts if isinstance(part, Content))
        thought = "".join(part.text for part in parts if isinstance(part, Reasoning))
        calls = [_call_delta(part) for part in parts if isinstance(part, CallPart)]
        fields: dict[str, object] = {}
        if content:
            fields["content"] = content
        if thought and self._shows_reasoning:
            fields |= {"reasoning_content": thought, "reasoning": thought}
        if calls:
            self.has_called = True
            fields["tool_calls"] = calls
        return AnswerMessage.model_validate(fields) if fields else None


def _call_delta(part: CallPart) -> CallBody:
    function = CallFunction(arguments=part.arguments)
    if part.name is None:
        return CallBody(index=part.index, function=function)
    function.name = part.name
    return CallBody(index=part.index, id=part.id, type="function", function=function)
