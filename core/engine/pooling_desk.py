"""Requests that become numbers: what a front sends for them, and what it makes of the answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import numpy as np

from quire.core.engine.facts import EngineFacts
from quire.core.engine.pooling import PoolingOutput, PoolingParams, check_task
from quire.core.engine.prompts import ParsedPrompt, Prompt, parse_prompt
from quire.core.engine.sampling_spec import check_token_ids
from quire.core.engine.tokenizer import TextCodec, no_tokenizer
from quire.core.errors import QuireError, RequestError
from quire.core.interface.worker import PooledNumbers, PoolingSpec, SamplingSpec
from quire.core.scheduler.request import FinishReason, RequestSpec, RequestUpdate

Answer = PoolingOutput | QuireError
"""What becomes of a request."""
_LONG_TEXT_CHARS = 2000
"""From here a text is tokenized in a thread, so that others go on."""


class PoolingDesk:
    """Prepares requests for numbers and follows those in flight. Used by one thread."""

    def __init__(self, facts: EngineFacts, codec: TextCodec | None) -> None:
        self._facts = facts
        self._codec = codec
        self._in_flight: dict[str, tuple[RequestSpec, Callable[[Answer], None]]] = {}

    @property
    def num_unfinished(self) -> int:
        """Requests in flight."""
        return len(self._in_flight)

    # --- in -------------------------------------------------------------------------------------

    def is_slow(self, prompt: Prompt, pair: str | None) -> bool:
        """Whether `prepare` takes so long that it belongs into another thread."""
        text = prompt if isinstance(prompt, str) else ""
        return len(text) + len(pair or "") >= _LONG_TEXT_CHARS

    def prepare(
        self,
        prompt: Prompt,
        params: PoolingParams,
        request_id: str,
        *,
        pair: str | None = None,
        add_special_tokens: bool = True,
    ) -> RequestSpec:
        """One request for the core, complete. May run in any thread.

        Raises: RequestError naming the field; CheckpointError for text without a tokenizer.
        """
        check_task(params.task, self._facts.tasks, self._facts.served_model_name)
        self._check_dimensions(params)
        limit = self._most_tokens(params)
        parsed = parse_prompt(prompt)
        ids, types = self._encode(parsed, pair, limit, add_special_tokens=add_special_tokens)
        self._check_length(len(ids))
        check_token_ids(ids, self._facts.vocab_size, "prompt")
        return RequestSpec(
            request_id=request_id,
            prompt_token_ids=ids,
            sampling=SamplingSpec(),
            max_tokens=1,
            arrival_time_s=time.monotonic(),
            pooling=PoolingSpec(
                task=params.task,
                dimensions=params.dimensions,
                use_activation=params.use_activation,
                token_type_ids=types if any(types) else [],
            ),
        )

    def _encode(
        self, parsed: ParsedPrompt, pair: str | None, limit: int | None, *, add_special_tokens: bool
    ) -> tuple[list[int], list[int]]:
        if parsed.token_ids is not None:
            if pair is not None:
                raise RequestError("a pair is two texts; token ids were given", param="prompt")
            return parsed.token_ids[:limit], []
        if self._codec is None:
            raise no_tokenizer(self._facts.model)
        try:
            return self._codec.encode_pair(
                parsed.text or "", pair, add_special_tokens=add_special_tokens, max_tokens=limit
            )
        except ValueError as error:
            raise RequestError(
                f"truncate_prompt_tokens is {limit}, and {error}; ask for more",
                param="truncate_prompt_tokens",
            ) from error

    def _most_tokens(self, params: PoolingParams) -> int | None:
        asked, limit = params.truncate_prompt_tokens, self._facts.max_model_len
        if asked is None:
            return None
        if asked == -1:
            return limit
        if not 1 <= asked <= limit:
            raise RequestError(
                f"truncate_prompt_tokens is {asked}; give 1 to {limit}, or -1 for all that fit",
                param="truncate_prompt_tokens",
            )
        return asked

    def _check_dimensions(self, params: PoolingParams) -> None:
        if params.dimensions is None:
            return
        size = self._facts.vector_size
        if params.task not in ("embed", "token_embed"):
            raise RequestError(
                f"{params.task} has no dimensions; leave them out", param="dimensions"
            )
        if not 1 <= params.dimensions <= size:
            raise RequestError(
                f"dimensions is {params.dimensions}; this model's vectors have {size}",
                param="dimensions",
            )

    def _check_length(self, num_tokens: int) -> None:
        limit = self._facts.max_model_len
        if not num_tokens:
            raise RequestError("the text is empty; give at least one token", param="prompt")
        if num_tokens > limit:
            raise RequestError(
                f"the text has {num_tokens} tokens and the model takes {limit}; shorten it, or set "
                "truncate_prompt_tokens",
                param="prompt",
            )

    # --- out ------------------------------------------------------------------------------------

    def add(self, spec: RequestSpec, answer: Callable[[Answer], None]) -> None:
        """Follows a request; `answer` is called once. Raises: RequestError for an id in flight."""
        if spec.request_id in self._in_flight:
            raise RequestError(
                f"request_id {spec.request_id!r} is in flight already; choose another",
                param="request_id",
            )
        self._in_flight[spec.request_id] = (spec, answer)

    def process(self, updates: Iterable[RequestUpdate]) -> None:
        """Hands out what has come of the requests among `updates` that are followed here."""
        if not self._in_flight:
            return
        for update in updates:
            if update.finish_reason is not None:
                found = self._in_flight.pop(update.request_id, None)
                if found is not None:
                    found[1](_answer(found[0], update))

    def forget(self, request_id: str) -> bool:
        """Follows a request no more. Returns whether the core still works on it."""
        return self._in_flight.pop(request_id, None) is not None

    def fail_all(self, error: QuireError) -> None:
        """Answers everybody with an error."""
        in_flight, self._in_flight = self._in_flight, {}
        for _, answer in in_flight.values():
            answer(error)


def settle(future: asyncio.Future[PoolingOutput], answer: Answer) -> None:
    """Gives a waiting task its answer, if it still waits."""
    if future.done():
        return
    if isinstance(answer, PoolingOutput):
        future.set_result(answer)
    else:
        future.set_exception(answer)


def _answer(spec: RequestSpec, update: RequestUpdate) -> Answer:
    if update.pooled is not None:
        return PoolingOutput(
            data=numbers_of(update.pooled), num_prompt_tokens=len(spec.prompt_token_ids)
        )
    if update.finish_reason is FinishReason.ABORT:
        return RequestError("the request was ended before it was answered")
    return RequestError(update.error or "the engine brought no answer")


def numbers_of(pooled: PooledNumbers) -> list[float] | list[list[float]]:
    """Plain lists of a record."""
    numbers: list[float] | list[list[float]] = (
        np.frombuffer(pooled.data, "<f4").reshape(pooled.shape).tolist()
    )
    return numbers
