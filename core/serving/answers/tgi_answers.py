"""The bodies of `/generate` and `/generate_stream`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from quire.core.outputs import CompletionOutput, Logprob, TokenLogprobs
from quire.core.serving.answers.answers import PromptFacts, Tally, collect
from quire.core.serving.answers.generation import Generation
from quire.core.serving.http.error_responses import Failure, failure_of
from quire.core.serving.http.sse import StreamStyle, event
from quire.core.serving.protocol.tgi import (
    GenerateRequest,
    GenerateResponse,
    StreamResponse,
    TgiDetails,
    TgiError,
    TgiPromptToken,
    TgiStreamDetails,
    TgiToken,
)

_ERROR_TYPES = {429: "overloaded", 400: "validation", 413: "validation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TgiWriter:
    """Writes the answer to one request."""

    request: GenerateRequest
    special_ids: frozenset[int]
    """Tokens that are no text."""

    async def whole(self, generation: Generation) -> GenerateResponse:
        """The answer when everything is there."""
        [output], _ = await collect(generation)
        settings, child = self.request.settings, output.child
        answer = GenerateResponse(generated_text=self._shown(child.text))
        if settings.details:
            tokens = list(self._tokens(child))
            answer.details = TgiDetails(
                finish_reason=_reason(child),
                generated_tokens=len(tokens),
                seed=settings.seed,
                prefill=_prompt_tokens(output.facts) if settings.decoder_input_details else [],
                tokens=tokens,
            )
            if settings.top_n_tokens:
                answer.details.top_tokens = [self._top(row) for row in child.logprobs or []]
        return answer

    async def chunks(self, generation: Generation) -> AsyncGenerator[bytes]:
        """One JSON body a token; the last one has the whole text."""
        tally, text, num_tokens = Tally(), "", 0
        async with aclosing(generation.outputs()) as outputs:
            async for item in outputs:
                facts = tally.note(item)
                for child in item.output.outputs:
                    text += child.text
                    for body in self._events(child, num_tokens):
                        num_tokens += 1
                        if child.is_finished and num_tokens == tally.num_output_tokens:
                            body.generated_text = self._shown(text)
                            body.details = self._end(child, facts, num_tokens)
                        yield body.to_json()

    def _events(self, child: CompletionOutput, first: int) -> Iterator[StreamResponse]:
        """An event for each token; the text of several that came together is with the last."""
        tokens = list(self._tokens(child))
        for index, token in enumerate(tokens):
            is_last = index == len(tokens) - 1
            token.text = child.text if is_last else ""
            # Clients do not show special tokens, and this one has text that waited for its end.
            token.special = token.special and not token.text
            body = StreamResponse(
                index=first + index + 1, token=token, generated_text=None, details=None
            )
            if self.request.settings.top_n_tokens:
                body.top_tokens = self._top((child.logprobs or [])[index])
            yield body

    def _end(self, child: CompletionOutput, facts: PromptFacts, num: int) -> TgiStreamDetails:
        return TgiStreamDetails(
            finish_reason=_reason(child),
            generated_tokens=num,
            input_length=len(facts.token_ids),
            seed=self.request.settings.seed,
        )

    def _shown(self, text: str) -> str:
        return self.request.inputs + text if self.request.settings.return_full_text else text

    def _tokens(self, child: CompletionOutput) -> Iterator[TgiToken]:
        rows: Sequence[TokenLogprobs] = child.logprobs or []
        for token_id, row in zip(child.token_ids, rows, strict=True):
            yield self._token(token_id, row)

    def _token(self, token_id: int, row: Mapping[int, Logprob]) -> TgiToken:
        found = row[token_id]
        return TgiToken(
            id=token_id,
            text=found.decoded_token or "",
            logprob=_finite(found.logprob),
            special=token_id in self.special_ids,
        )

    def _top(self, row: Mapping[int, Logprob]) -> list[TgiToken]:
        ranked = sorted(row, key=lambda token_id: row[token_id].rank or 0)
        most = self.request.settings.top_n_tokens or 0
        return [self._token(token_id, row) for token_id in ranked[:most]]


def error_body(failure: Failure) -> TgiError:
    """A failure as text-generation-inference tells it."""
    kind = _ERROR_TYPES.get(failure.status, "generation")
    return TgiError(error=failure.message, error_type=kind)


def _failed(error: Exception) -> bytes:
    return event(error_body(failure_of(error)).to_json())


TGI_STYLE = StreamStyle(failed=_failed, end=b"")


def _reason(child: CompletionOutput) -> str:
    if child.finish_reason == "stop":
        return "eos_token" if child.stop_reason is None else "stop_sequence"
    return child.finish_reason or "length"


def _prompt_tokens(facts: PromptFacts) -> list[TgiPromptToken]:
    rows = facts.logprobs or [None] * len(facts.token_ids)
    tokens = []
    for token_id, row in zip(facts.token_ids, rows, strict=True):
        found = None if row is None else row[token_id]
        text = "" if found is None else found.decoded_token or ""
        logprob = None if found is None else _finite(found.logprob)
        tokens.append(TgiPromptToken(id=token_id, text=text, logprob=logprob))
    return tokens


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)
