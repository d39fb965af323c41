"""Answers `/v1/responses`: through a chat, whole, streamed or in the background."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from quire.core.serving.answers.chat_answers import ChatWriter
from quire.core.serving.answers.generation import Generation
from quire.core.serving.answers.response_events import ResponseEvents
from quire.core.serving.answers.response_input import Message
from quire.core.serving.answers.response_store import ResponseStore, StoredResponse
from quire.core.serving.http.error_responses import failure_of
from quire.core.serving.http.gate import Gate
from quire.core.serving.protocol.responses import (
    FunctionCallItem,
    OutputMessage,
    ResponseObject,
    ResponsesRequest,
)


@dataclass(slots=True, kw_only=True)
class ResponseWriter:
    """Writes one response and remembers it where that was asked."""

    chat: ChatWriter
    events: ResponseEvents
    entry: StoredResponse
    store: ResponseStore | None
    """None: nothing is remembered."""

    async def whole(self, generation: Generation) -> ResponseObject:
        """The response when everything is there. Raises: what the generation raises."""
        async with aclosing(self.stream(generation)) as stream:
            async for _ in stream:
                pass
        return self.entry.response

    async def stream(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The events as they come. Raises: what the generation raises."""
        for event in self.events.begin():
            yield event
        async with aclosing(self.chat.stream(generation)) as chunks:
            async for chunk in chunks:
                for event in self.events.take(chunk):
                    yield event
        last = list(self.events.finish())
        # Before the last event: who reads it may ask for the response at once.
        self._remember()
        for event in last:
            yield event

    def fail(self, error: Exception) -> bytes:
        """The event of a response that failed on its way."""
        failure = failure_of(error)
        event = self.events.fail(failure.code or failure.type, failure.message)
        self._remember()
        return event

    async def run(self, generation: Generation, gate: Gate) -> None:
        """Answers in the background: every way in which it ends is in the response.

        Counted like a request, so that a drain waits for it.
        """
        try:
            async with generation:
                with gate.entered():
                    await self.whole(generation)
        except Exception as error:
            self.fail(error)
        finally:
            if self.entry.response.status in {"queued", "in_progress"}:
                self.events.cancel()

    def _remember(self) -> None:
        if self.store is not None:
            self.store.put(self.entry)


def new_response(
    body: ResponsesRequest, *, response_id: str, model: str, created: int
) -> ResponseObject:
    """A response of which nothing is there yet."""
    text = body.text
    shown_format = {"type": "text"} if text is None or text.format is None else text.format
    return ResponseObject(
        id=response_id,
        created_at=created,
        completed_at=None,
        status="queued" if body.background else "in_progress",
        background=bool(body.background),
        error=None,
        incomplete_details=None,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        model=model,
        output=[],
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=None if body.reasoning is None else {"effort": body.reasoning.effort},
        store=body.is_stored,
        temperature=body.temperature,
        text={"format": shown_format},
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=body.top_p,
        truncation="disabled",
        usage=None,
        user=body.user,
    )


def conversation_after(entry: StoredResponse) -> list[Message]:
    """The messages with which a turn after this response begins."""
    texts, calls = [], []
    for item in entry.response.output:
        if isinstance(item, OutputMessage):
            texts += [part.text for part in item.content]
        elif isinstance(item, FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments}
            calls.append({"id": item.call_id, "type": "function", "function": function})
    answer: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if calls:
        answer["tool_calls"] = calls
    return [*entry.messages, answer]
