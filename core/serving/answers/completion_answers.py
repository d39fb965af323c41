"""The bodies of `/v1/completions`, whole and in chunks."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from quire.core.engine.async_engine import AsyncEngine
from quire.core.outputs import CompletionOutput, TokenLogprobs
from quire.core.serving.answers.answers import AnswerHead, PromptFacts, Tally, collect
from quire.core.serving.answers.generation import Generation
from quire.core.serving.answers.logprobs import (
    TokenNames,
    completion_logprobs,
    prompt_logprobs_body,
)
from quire.core.serving.answers.plain_chunks import PlainChunks
from quire.core.serving.protocol.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionWriter:
    """Writes the answer to one request."""

    request: CompletionRequest
    head: AnswerHead
    engine: AsyncEngine

    async def whole(self, generation: Generation) -> CompletionResponse:
        """The answer when everything is there."""
        outputs, tally = await collect(generation)
        if self.request.generates_nothing:
            tally.num_output_tokens = 0
        choices = []
        for whole in outputs:
            index = self._choice_index(whole.prompt_index, whole.child)
            echoed = await self._echo(whole.facts)
            choices.append(self._choice(index, self._kept(whole.child), whole.facts, echoed, 0))
        return self._body(choices).model_copy(update={"usage": tally.usage()})

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes]:
        """The answer as it comes, one JSON body a chunk."""
        tally = Tally()
        lengths: dict[int, int] = {}
        plain = self._plain_chunks(tally)
        async with aclosing(generation.outputs()) as outputs:
            async for item in outputs:
                facts = tally.note(item)
                for child in map(self._kept, item.output.outputs):
                    index = self._choice_index(item.prompt_index, child)
                    is_first = index not in lengths
                    if plain is not None and not (is_first or child.is_finished):
                        if child.text:
                            yield plain.body(index, child.text)
                        continue
                    echoed = await self._echo(facts) if is_first else ""
                    if not (is_first or self._says_something(child)):
                        continue
                    offset = lengths.get(index, 0)
                    choice = self._choice(index, child, facts if is_first else None, echoed, offset)
                    lengths[index] = offset + len(choice.text)
                    yield self._chunk([choice], tally)
            if self.request.streams_usage:
                yield self._chunk([], tally, is_last=True)

    def _plain_chunks(self, tally: Tally) -> PlainChunks | None:
        """Of chunks that add text and nothing else; None where they tell more."""
        asked = self.request
        if asked.logprobs is not None or asked.return_token_ids or asked.generates_nothing:
            return None
        if asked.streams_usage_continuously:
            return None

        def make(index: int, text: str) -> bytes:
            child = CompletionOutput(index=index, text=text, token_ids=())
            return self._chunk([self._choice(index, child, None, "", 0)], tally)

        return PlainChunks(make)

    def _chunk(
        self, choices: list[CompletionChoice], tally: Tally, *, is_last: bool = False
    ) -> bytes:
        body = self._body(choices)
        if self.request.generates_nothing:
            tally = replace(tally, num_output_tokens=0)
        if is_last or self.request.streams_usage_continuously:
            body.usage = tally.usage()
        elif self.request.streams_usage:
            body.usage = None
        return body.to_json()

    def _body(self, choices: list[CompletionChoice]) -> CompletionResponse:
        return CompletionResponse(
            id=self.head.id,
            object="text_completion",
            created=self.head.created,
            model=self.head.model,
            choices=choices,
        )

    def _choice_index(self, prompt_index: int, child: CompletionOutput) -> int:
        return prompt_index * (self.request.n or 1) + child.index

    def _kept(self, child: CompletionOutput) -> CompletionOutput:
        """The output without the one token that the engine computes even where none is wanted."""
        if not self.request.generates_nothing:
            return child
        reason = None if child.finish_reason is None else "length"
        logprobs: list[TokenLogprobs] | None = None if child.logprobs is None else []
        return CompletionOutput(
            index=child.index, text="", token_ids=[], logprobs=logprobs, finish_reason=reason
        )

    async def _echo(self, facts: PromptFacts) -> str:
        if not self.request.echo:
            return ""
        if facts.text is None or self.request.truncate_prompt_tokens is not None:
            facts.text = await self.engine.decode(facts.token_ids)
        if self.request.logprobs is not None:
            facts.first_token_text = await self.engine.decode(facts.token_ids[:1])
        return facts.text

    def _says_something(self, child: CompletionOutput) -> bool:
        wants_tokens = self.request.logprobs is not None or self.request.return_token_ids
        return bool(child.text or child.is_finished or (wants_tokens and child.token_ids))

    def _choice(
        self,
        index: int,
        child: CompletionOutput,
        facts: PromptFacts | None,
        echoed: str,
        offset: int,
    ) -> CompletionChoice:
        """A choice; `facts` of the prompt where this is the first that is told of it."""
        choice = CompletionChoice(
            index=index,
            text=echoed + child.text,
            logprobs=self._logprobs(child, facts, echoed, offset),
            finish_reason=child.finish_reason,
            stop_reason=child.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = list(child.token_ids)
            if facts is not None:
                choice.prompt_token_ids = facts.token_ids
        if self.request.prompt_logprobs is not None and facts is not None:
            choice.prompt_logprobs = prompt_logprobs_body(facts.logprobs or [])
        return choice

    def _logprobs(
        self, child: CompletionOutput, facts: PromptFacts | None, echoed: str, offset: int
    ) -> CompletionLogprobs | None:
        num_top = self.request.logprobs
        if num_top is None:
            return None
        names = TokenNames(as_ids=bool(self.request.return_tokens_as_token_ids))
        own = completion_logprobs(
            child.token_ids,
            child.logprobs or [],
            num_top=num_top,
            text_offset=offset + len(echoed),
            names=names,
        )
        if not self.request.echo or facts is None:
            return own
        first = facts.first_token_text
        # A special token that the tokenizer put in front does not stand in the text.
        lead = 0 if echoed.startswith(first) else len(first)
        prompt = completion_logprobs(
            facts.token_ids,
            facts.logprobs or [],
            num_top=num_top,
            text_offset=offset - lead,
            names=names,
            first_text=first,
        )
        return _joined([prompt, own])


def _joined(parts: Sequence[CompletionLogprobs]) -> CompletionLogprobs:
    def column(name: str) -> Iterator[object]:
        for part in parts:
            yield from getattr(part, name)

    columns = {name: list(column(name)) for name in CompletionLogprobs.model_fields}
    return CompletionLogprobs.model_validate(columns)
