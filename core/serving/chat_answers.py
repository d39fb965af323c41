"""The bodies of `/v1/chat/completions`, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from quire.core.outputs import CompletionOutput
from quire.core.serving.answers import AnswerHead, PromptFacts, Tally, collect
from quire.core.serving.generation import Generation
from quire.core.serving.logprobs import TokenNames, chat_logprobs, prompt_logprobs_body
from quire.core.serving.protocol.chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    ChatRequest,
    ChatResponse,
)
from quire.core.serving.token_bytes import TokenBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWriter:
    """Writes the answer to one request."""

    request: ChatRequest
    head: AnswerHead
    token_bytes: TokenBytes

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
        async with aclosing(self.stream(generation)) as stream:
            async for chunk in stream:
                yield chunk.to_json()

    async def stream(self, generation: Generation) -> AsyncGenerator[ChatChunk]:
        """The answer as it comes; each choice begins with its role.

        What other endpoints that answer conversations write is made of the same chunks.
        """
        tally = Tally()
        async with aclosing(generation.outputs()) as outputs:
            for index in range(self.request.n or 1):
                delta = AnswerMessage(role="assistant", content="")
                yield self._chunk([_opening(index, delta)], tally)
            async for item in outputs:
                is_first = not tally.prompts
                facts = tally.note(item)
                told = [c for c in item.output.outputs if self._says_something(c)]
                if not told and not (is_first and self._tells_prompt()):
                    continue
                chunk = self._chunk([self._chunk_choice(child) for child in told], tally)
                if is_first:
                    self._add_prompt(chunk, facts)
                yield chunk
            if self.request.streams_usage:
                yield self._chunk([], tally, is_last=True)

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
        choice = ChatChoice(
            index=child.index,
            message=AnswerMessage(role="assistant", content=child.text, refusal=None),
            logprobs=self._logprobs(child),
            finish_reason=child.finish_reason,
            stop_reason=child.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(child.token_ids)
        return choice

    def _chunk_choice(self, child: CompletionOutput) -> ChatChunkChoice:
        choice = ChatChunkChoice(
            index=child.index,
            delta=AnswerMessage(content=child.text) if child.text else AnswerMessage(),
            logprobs=self._logprobs(child),
            finish_reason=child.finish_reason,
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

    def _says_something(self, child: CompletionOutput) -> bool:
        wants_tokens = self.request.logprobs or self.request.return_token_ids
        return bool(child.text or child.is_finished or (wants_tokens and child.token_ids))

    def _tells_prompt(self) -> bool:
        return bool(self.request.return_token_ids) or self.request.prompt_logprobs is not None

    def _add_prompt(self, body: ChatResponse | ChatChunk, facts: PromptFacts) -> None:
        if self.request.return_token_ids:
            body.prompt_token_ids = facts.token_ids
        if self.request.prompt_logprobs is not None:
            body.prompt_logprobs = prompt_logprobs_body(facts.logprobs or [])


def _opening(index: int, delta: AnswerMessage) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
