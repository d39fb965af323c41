"""The events of a streamed `/v1/messages`, and the answer that they add up to."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pydantic_core

from quire.core.serving.answers.answer_pieces import CallPiece, Piece, pieces_of
from quire.core.serving.answers.chat_answers import ChatWriter
from quire.core.serving.answers.generation import Generation
from quire.core.serving.http.error_responses import Failure, failure_of
from quire.core.serving.http.sse import StreamStyle, named_event
from quire.core.serving.protocol.chat import ChatChunk
from quire.core.serving.protocol.messages import (
    AnthropicError,
    AnthropicErrorDetail,
    MessagesAnswer,
    MessagesUsage,
)

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_BLOCKS = {"text": "text", "reasoning": "thinking", "call": "tool_use"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(slots=True, kw_only=True)
class MessageWriter:
    """Writes one answer. Grows `answer` and yields the events of each step."""

    chat: ChatWriter
    answer: MessagesAnswer
    _arguments: str = ""
    """Of the open `tool_use` block."""
    _call_index: int | None = None
    _is_open: bool = False

    async def whole(self, generation: Generation) -> MessagesAnswer:
        """The answer when everything is there."""
        async with aclosing(self.stream(generation)) as stream:
            async for _ in stream:
                pass
        return self.answer

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The events as they come."""
        yield _event("message_start", message=self.answer)
        yield PING
        async with aclosing(self.chat.stream(generation)) as chunks:
            async for chunk in chunks:
                for event in self._take(chunk):
                    yield event
        for event in self._end_block():
            yield event
        delta = {
            "stop_reason": self.answer.stop_reason,
            "stop_sequence": self.answer.stop_sequence,
        }
        yield _event("message_delta", delta=delta, usage=self.answer.usage)
        yield _event("message_stop")

    def _take(self, chunk: ChatChunk) -> Iterator[bytes]:
        if chunk.usage is not None:
            cached = chunk.usage.prompt_tokens_details.cached_tokens
            self.answer.usage = MessagesUsage(
                input_tokens=chunk.usage.prompt_tokens - cached,
                cache_creation_input_tokens=0,
                cache_read_input_tokens=cached,
                output_tokens=chunk.usage.completion_tokens,
            )
        for choice in chunk.choices:
            for piece in pieces_of(choice.delta):
                yield from self._take_piece(piece)
            if choice.finish_reason is not None:
                self._note_end(choice.finish_reason, choice.stop_reason)

    def _note_end(self, reason: str, stop_reason: int | str | None) -> None:
        if reason == "stop" and isinstance(stop_reason, str):
            self.answer.stop_reason, self.answer.stop_sequence = "stop_sequence", stop_reason
            return
        self.answer.stop_reason = _STOP_REASONS.get(reason, "end_turn")

    # --------------------------------------------------------------------------------- blocks

    def _take_piece(self, piece: Piece) -> Iterator[bytes]:
        if not self._continues(piece):
            yield from self._end_block()
            yield from self._begin_block(piece)
        block = self.answer.content[-1]
        if isinstance(piece, CallPiece):
            self._arguments += piece.arguments
            if not piece.arguments:
                return
            delta = {"type": "input_json_delta", "partial_json": piece.arguments}
        elif piece.kind == "reasoning":
            block["thinking"] += piece.text
            delta = {"type": "thinking_delta", "thinking": piece.text}
        else:
            block["text"] += piece.text
            delta = {"type": "text_delta", "text": piece.text}
        yield _event("content_block_delta", index=len(self.answer.content) - 1, delta=delta)

    def _continues(self, piece: Piece) -> bool:
        if not self._is_open or self.answer.content[-1]["type"] != _BLOCKS[piece.kind]:
            return False
        return not isinstance(piece, CallPiece) or piece.index == self._call_index

    def _begin_block(self, piece: Piece) -> Iterator[bytes]:
        block = _block_for(piece)
        self._call_index = piece.index if isinstance(piece, CallPiece) else None
        self._arguments, self._is_open = "", True
        self.answer.content.append(block)
        index = len(self.answer.content) - 1
        yield _event("content_block_start", index=index, content_block=block)

    def _end_block(self) -> Iterator[bytes]:
        if not self._is_open:
            return
        self._is_open = False
        block = self.answer.content[-1]
        if block["type"] == "tool_use":
            block["input"] = _parsed(self._arguments)
        yield _event("content_block_stop", index=len(self.answer.content) - 1)


def new_answer(answer_id: str, model: str) -> MessagesAnswer:
    """An answer of which nothing is there yet."""
    usage = MessagesUsage(
        input_tokens=0, cache_creation_input_tokens=0, cache_read_input_tokens=0, output_tokens=0
    )
    return MessagesAnswer(
        id=answer_id,
        type="message",
        role="assistant",
        model=model,
        content=[],
        stop_reason=None,
        stop_sequence=None,
        usage=usage,
    )


def error_body(failure: Failure, request_id: str | None) -> AnthropicError:
    """A failure as this API tells it."""
    kind = _ERROR_TYPES.get(failure.status, "api_error")
    detail = AnthropicErrorDetail(type=kind, message=failure.message)
    return AnthropicError(type="error", error=detail, request_id=request_id)


def _event(kind: str, **fields: Any) -> bytes:
    return named_event(kind, pydantic_core.to_json({"type": kind, **fields}))


def _failed(error: Exception) -> bytes:
    return named_event("error", error_body(failure_of(error), None).to_json())


PING = _event("ping")
MESSAGES_STYLE = StreamStyle(frame=bytes, failed=_failed, end=b"", keep_alive=PING)
"""Events have names, and `ping` keeps a stream alive."""


def _block_for(piece: Piece) -> dict[str, Any]:
    if isinstance(piece, CallPiece):
        call_id = piece.call_id or f"toolu_{uuid.uuid4().hex}"
        return {"type": "tool_use", "id": call_id, "name": piece.name, "input": {}}
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _parsed(arguments: str) -> Any:
    """What the model wrote as arguments; what is no JSON (it was cut) is told as it stands."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return {"_raw": arguments}
