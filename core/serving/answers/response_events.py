"""The events of a streamed `/v1/responses`, and the response that they add up to."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pydantic_core

from quire.core.serving.answers.answer_pieces import CallPiece, Piece, TextPiece, pieces_of
from quire.core.serving.http.sse import named_event
from quire.core.serving.protocol.chat import ChatChunk, ChatLogprobs
from quire.core.serving.protocol.responses import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    OutputItem,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
)
from quire.core.serving.protocol.usage import Usage

_OPENERS = {"text": "message", "reasoning": "reasoning", "call": "function_call"}


@dataclass(slots=True)
class ResponseEvents:
    """Takes the chunks of a chat's answer. Grows `response` and yields the events of each step.

    Output items follow each other: an item is done when one of another kind begins.
    """

    response: ResponseObject
    tells_logprobs: bool
    _number: int = 0
    _open: OutputItem | None = None
    _call_index: int | None = None
    _finish_reason: str | None = None
    _usage: Usage | None = field(default=None)

    def begin(self) -> Iterator[bytes]:
        """The two events before anything was computed."""
        yield self._event("response.created", response=self.response)
        self.response.status = "in_progress"
        yield self._event("response.in_progress", response=self.response)

    def take(self, chunk: ChatChunk) -> Iterator[bytes]:
        """What a chunk adds."""
        if chunk.usage is not None:
            self._usage = chunk.usage
        for choice in chunk.choices:
            for piece in pieces_of(choice.delta):
                yield from self._take_piece(piece, choice.logprobs)
            self._finish_reason = choice.finish_reason or self._finish_reason

    def finish(self) -> Iterator[bytes]:
        """What follows the last chunk."""
        is_cut = self._finish_reason == "length"
        if self._open is None and not self.response.output:
            yield from self._begin_item(TextPiece("text", ""))
        yield from self._end_item("incomplete" if is_cut else "completed")
        self.response.usage = None if self._usage is None else _usage(self._usage)
        if self._finish_reason == "abort":
            yield self.fail("aborted", "the server ended the request")
            return
        if is_cut:
            self.response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        self.response.status = "incomplete" if is_cut else "completed"
        self.response.completed_at = None if is_cut else int(time.time())
        yield self._event(f"response.{self.response.status}", response=self.response)

    def fail(self, code: str, message: str) -> bytes:
        """The last event of a response that cannot be finished."""
        self.response.status = "failed"
        self.response.error = ResponseFailure(code=code, message=message)
        return self._event("response.failed", response=self.response)

    def cancel(self) -> None:
        """Nobody wants the rest."""
        self.response.status = "cancelled"
        if self._open is not None:
            self._open.status = "incomplete"

    # ---------------------------------------------------------------------------------- items

    def _take_piece(self, piece: Piece, logprobs: ChatLogprobs | None) -> Iterator[bytes]:
        if not self._continues(piece):
            yield from self._end_item("completed")
            yield from self._begin_item(piece)
        item = self._open
        if isinstance(piece, CallPiece) and isinstance(item, FunctionCallItem):
            item.arguments += piece.arguments
            if piece.arguments:
                name = "response.function_call_arguments.delta"
                yield self._item_event(name, delta=piece.arguments)
        elif isinstance(piece, TextPiece) and isinstance(item, OutputMessage):
            told = _logprobs(logprobs) if self.tells_logprobs else []
            item.content[0].text += piece.text
            item.content[0].logprobs += told
            name = "response.output_text.delta"
            yield self._item_event(name, content_index=0, delta=piece.text, logprobs=told)
        elif isinstance(piece, TextPiece) and isinstance(item, ReasoningItem):
            item.content[0].text += piece.text
            name = "response.reasoning_text.delta"
            yield self._item_event(name, content_index=0, delta=piece.text)

    def _continues(self, piece: Piece) -> bool:
        if self._open is None or self._open.type != _OPENERS[piece.kind]:
            return False
        return not isinstance(piece, CallPiece) or piece.index == self._call_index

    def _begin_item(self, piece: Piece) -> Iterator[bytes]:
        item = _item_for(piece)
        self._call_index = piece.index if isinstance(piece, CallPiece) else None
        self._open = item
        self.response.output.append(item)
        # As it is before its first part: the parts are told by events of their own.
        bare = (
            item if isinstance(item, FunctionCallItem) else item.model_copy(update={"content": []})
        )
        yield self._event(
            "response.output_item.added", output_index=len(self.response.output) - 1, item=bare
        )
        if not isinstance(item, FunctionCallItem):
            name = "response.content_part.added"
            yield self._item_event(name, content_index=0, part=item.content[0])

    def _end_item(self, status: Any) -> Iterator[bytes]:
        item = self._open
        if item is None:
            return
        item.status = status
        if isinstance(item, FunctionCallItem):
            name = "response.function_call_arguments.done"
            yield self._item_event(name, name=item.name, arguments=item.arguments)
        else:
            yield from self._end_text(item)
        yield self._event(
            "response.output_item.done", output_index=len(self.response.output) - 1, item=item
        )
        self._open = None

    def _end_text(self, item: OutputMessage | ReasoningItem) -> Iterator[bytes]:
        part = item.content[0]
        if isinstance(part, OutputText):
            yield self._item_event(
                "response.output_text.done",
                content_index=0,
                text=part.text,
                logprobs=part.logprobs,
            )
        else:
            yield self._item_event("response.reasoning_text.done", content_index=0, text=part.text)
        yield self._item_event("response.content_part.done", content_index=0, part=part)

    # --------------------------------------------------------------------------------- events

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None, kind
        place = {"item_id": self._open.id, "output_index": len(self.response.output) - 1}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return named_event(kind, pydantic_core.to_json(body))


def _item_for(piece: Piece) -> OutputItem:
    if isinstance(piece, CallPiece):
        return FunctionCallItem(
            id=_new_id("fc"),
            status="in_progress",
            call_id=piece.call_id or _new_id("call"),
            name=piece.name,
            arguments="",
        )
    if piece.kind == "reasoning":
        content = [ReasoningText(text="")]
        return ReasoningItem(id=_new_id("rs"), status="in_progress", summary=[], content=content)
    part = OutputText(text="", annotations=[], logprobs=[])
    return OutputMessage(id=_new_id("msg"), status="in_progress", content=[part])


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _logprobs(given: ChatLogprobs | None) -> list[dict[str, Any]]:
    return [] if given is None else [token.model_dump() for token in given.content]


def _usage(usage: Usage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(
            cached_tokens=usage.prompt_tokens_details.cached_tokens
        ),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )
