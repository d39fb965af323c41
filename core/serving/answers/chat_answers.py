"""The bodies of `/v1/chat/completions`, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from quire.core.outputs import CompletionOutput
from quire.core.serving.answers.answer_messages import DeltaReader, whole_message
from quire.core.serving.answers.answers import AnswerHead, PromptFacts, Tally, collect
from quire.core.serving.answers.generation import Generation
from quire.core.serving.answers.logprobs import TokenNames, chat_logprobs, prompt_logprobs_body
from quire.core.serving.answers.plain_chunks import PlainChunks
from quire.core.serving.answers.token_bytes import TokenBytes
from quire.core.serving.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
)
from quire.core.serving.tools.events import AnswerParser

AddedText = tuple[int, str]
"""The index of a choice, and what was added to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWriter:
    """Writes the answer to one request."""

    request: ChatRequest
    head: AnswerHead
    token_bytes: TokenBytes
    make_parser: Callable[[], AnswerParser] | None = None
    """None: answers are text and nothing else."""

    async def whole(self, generation: Generation) -> ChatResponse:
        """The answer when everything is there."""
        outputs, tally = await collect(generation)
        response = ChatResponse(
            id=self.head.id,
            object="chat.completion",
            created=self.head.created,
            model=self.head.model,
            choices=[self._choice(whole.child) for whole in outputs],
            usage=tally.usage(),
        )
        for facts in tally.prompts.values():
            self._add_prompt(response, facts)
        return response

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The answer as it comes, one JSON body a chunk."""
        plain = PlainChunks(lambda index, text: self._text_chunk(index, text).to_json())
        async with aclosing(self._events(generation)) as events:
            async for event in events:
                if isinstance(event, ChatChunk):
                    yield event.to_json()
                else:
                    yield plain.body(*event)

    async def stream(self, generation: Generation) -> AsyncGenerator[ChatChunk]:
        """The answer as it comes; each choice begins with its role.

        What other endpoints that answer conversations write is made of the same chunks.
        """
        async with aclosing(self._events(generation)) as events:
            async for event in events:
                yield event if isinstance(event, ChatChunk) else self._text_chunk(*event)

    async def _events(self, generation: Generation) -> AsyncGenerator[ChatChunk | AddedText]:
        """The chunks; of those that add text and nothing else only what they add."""
        tally, is_plain = Tally(), self._is_plain
        readers = [DeltaReader(self.make_parser, self.request) for _ in range(self.request.n or 1)]
        async with aclosing(generation.outputs()) as outputs:
            for index in range(self.request.n or 1):
                delta = AnswerMessage(role="assistant", content="")
                yield self._chunk([_opening(index, delta)], tally)
            async for item in outputs:
                is_first = not tally.prompts
                facts = tally.note(item)
                if not is_first and is_plain and len(item.output.outputs) == 1:
                    child = item.output.outputs[0]
                    if not child.is_finished:
                        if child.text:
                            yield child.index, child.text
                        continue
                choices = [self._chunk_choice(c, readers[c.index]) for c in item.output.outputs]
                told = [choice for choice in choices if choice is not None]
                if not told and not (is_first and self._tells_prompt()):
                    continue
                chunk = self._chunk(told, tally)
                if is_first:
                    self._add_prompt(chunk, facts)
                yield chunk
            if self.request.streams_usage:
                yield self._chunk([], tally, is_last=True)

    @property
    def _is_plain(self) -> bool:
        """Whether chunks between the first and the last add text and tell nothing else."""
        asked = self.request
        tells_tokens = asked.logprobs or asked.return_token_ids
        return self.make_parser is None and not (tells_tokens or asked.streams_usage_continuously)

    def _text_chunk(self, index: int, text: str) -> ChatChunk:
        choice = ChatChunkChoice(
            index=index, delta=AnswerMessage(content=text), logprobs=None, finish_reason=None
        )
        return self._chunk([choice], Tally())

    def _chunk(
        self, choices: list[ChatChunkChoice], tally: Tally, *, is_last: bool = False
    ) -> ChatChunk:
        chunk = ChatChunk(
            id=self.head.id,
            object="chat.completion.chunk",
            created=self.head.created,
            model=self.head.model,
            choices=choices,
        )
        if is_last or self.request.streams_usage_continuously:
            chunk.usage = tally.usage()
        elif self.request.streams_usage:
            chunk.usage = None
        return chunk

    def _choice(self, child: CompletionOutput) -> ChatChoice:
        message, has_called = whole_message(child.text, self.make_parser, self.request)
        choice = ChatChoice(
            index=child.index,
            message=message,
            logprobs=self._logprobs(child),
            finish_reason=_finish_reason(child, has_called=has_called),
            stop_reason=child.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(child.token_ids)
        return choice

    def _chunk_choice(self, child: CompletionOutput, reader: DeltaReader) -> ChatChunkChoice | None:
        """What to tell of an output; None: nothing."""
        delta = reader.read(child.text, is_last=child.is_finished)
        wants_tokens = self.request.logprobs or self.request.return_token_ids
        if delta is None and not child.is_finished and not (wants_tokens and child.token_ids):
            return None
        choice = ChatChunkChoice(
            index=child.index,
            delta=AnswerMessage() if delta is None else delta,
            logprobs=self._logprobs(child),
            finish_reason=_finish_reason(child, has_called=reader.has_called),
        )
        if child.is_finished:
            choice.stop_reason = child.stop_reason
        if self.request.return_token_ids:
            choice.token_ids = list(child.token_ids)
        return choice

    def _logprobs(self, child: CompletionOutput) -> ChatLogprobs | None:
        if not self.request.logprobs:
            return None
        names = TokenNames(as_ids=bool(self.request.return_tokens_as_token_ids))
        return chat_logprobs(
            child.token_ids,
            child.logprobs or [],
            num_top=self.request.top_logprobs or 0,
            names=names,
            token_bytes=self.token_bytes,
        )

    def _tells_prompt(self) -> bool:
        return bool(self.request.return_token_ids) or self.request.prompt_logprobs is not None

    def _add_prompt(self, body: ChatResponse | ChatChunk, facts: PromptFacts) -> None:
        if self.request.return_token_ids:
            body.prompt_token_ids = facts.token_ids
        if self.request.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs_body(facts.logprobs or [])


def _opening(index: int, delta: AnswerMessage) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


def _finish_reason(child: CompletionOutput, *, has_called: bool) -> str | None:
    """An answer that ended by itself and calls tools waits for their results."""
    if has_called and child.finish_reason == "stop":
        return "tool_calls"
    return child.finish_reason
