"""A request as its front follows it: what has come so far, and what its user wants to see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from quire.core.engine.input_processor import PreparedRequest
from quire.core.engine.output_text import OutputText
from quire.core.engine.tokenizer import TextCodec
from quire.core.interface.worker import PositionLogprobs
from quire.core.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    TokenLogprobs,
)
from quire.core.scheduler.request import FinishReason, RequestUpdate

OutputKind = Literal["delta", "cumulative", "final"]
"""`delta`: what came since the last output.

`cumulative`: all so far; `final`: one output at the end.
"""

Sink = Callable[[RequestOutput], None]


class RequestState:
    """A user's request with its `n` outputs."""

    __slots__ = (
        "children",
        "error",
        "kind",
        "metrics",
        "num_cached_tokens",
        "num_unfinished",
        "prepared",
        "prompt_logprobs",
        "sink",
        "wants_prompt_logprobs",
    )

    def __init__(self, prepared: PreparedRequest, kind: OutputKind, sink: Sink) -> None:
        self.prepared = prepared
        self.kind = kind
        self.sink = sink
        self.metrics = RequestMetrics(arrival_time_s=prepared.arrival_time_s)
        self.num_cached_tokens = 0
        self.error: str | None = None
        self.wants_prompt_logprobs = prepared.params.prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]
        self.children = [
            OutputState(self, index, spec.request_id) for index, spec in enumerate(prepared.specs)
        ]
        self.num_unfinished = len(self.children)

    def take_prompt_logprobs(self, positions: Sequence[PositionLogprobs]) -> None:
        """More of the prompt's log-probabilities."""
        codec = self.prepared.codec
        self.prompt_logprobs += [token_logprobs(position, codec) for position in positions]

    def output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        """The record for the user."""
        prepared = self.prepared
        return RequestOutput(
            request_id=prepared.request_id,
            prompt=prepared.prompt,
            prompt_token_ids=prepared.prompt_token_ids,
            outputs=outputs,
            is_finished=self.num_unfinished == 0,
            prompt_logprobs=self._shown_prompt_logprobs(),
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
            error=self.error,
            extra=prepared.params.extra,
        )

    def _shown_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """In deltas once, with the first output; all of the prompt is computed then."""
        if not self.wants_prompt_logprobs:
            return None
        if self.kind == "delta":
            self.wants_prompt_logprobs = False
        return self.prompt_logprobs


class OutputState:
    """One of the outputs of a request."""

    __slots__ = (
        "_is_text_late",
        "_num_shown_tokens",
        "_text",
        "cumulative_logprob",
        "finish_reason",
        "held",
        "index",
        "is_patient",
        "is_silent",
        "logprobs",
        "pieces",
        "request",
        "request_id",
        "shown_time_s",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, request: RequestState, index: int, request_id: str) -> None:
        prepared = request.prepared
        params, codec = prepared.params, prepared.codec
        self.request = request
        self.index = index
        self.request_id = request_id
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.cumulative_logprob = None if params.logprobs is None else 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._text = OutputText(params, codec, prepared.prompt_token_ids) if codec else None
        self._num_shown_tokens = 0
        self._is_text_late = request.kind == "final" and not params.stop_strings
        """Nobody sees or searches the text before the end: it is made there, at once."""
        self.is_silent = (
            (self._text is None or self._is_text_late)
            and self.logprobs is None
            and not request.wants_prompt_logprobs
            and request.kind == "final"
        )
        """Whether tokens are only gathered: nothing is looked at and nothing shown before the end.
        """
        self.is_patient = request.kind != "final" and not params.stop_strings
        """Whether tokens may wait for those after them: nothing in them can end the output."""
        self.held: RequestUpdate | None = None
        """What waits to be taken together with what comes next."""
        self.shown_time_s = 0.0
        """When the last piece was handed over, on the clock `time.monotonic`; 0: none was."""

    def hold(self, update: RequestUpdate) -> None:
        """Keeps an update that ends nothing for the next `take` of `with_held`."""
        self.held = self.with_held(update)

    def with_held(self, update: RequestUpdate) -> RequestUpdate:
        """What was held and `update` as one; nothing is held afterwards."""
        held, self.held = self.held, None
        if held is None:
            return update
        held.new_token_ids.extend(update.new_token_ids)
        if held.logprobs is not None and update.logprobs is not None:
            held.logprobs.extend(update.logprobs)
        return msgspec.structs.replace(
            update, new_token_ids=held.new_token_ids, logprobs=held.logprobs
        )

    def take(self, update: RequestUpdate) -> bool:
        """Takes one step's tokens.

        Returns whether a stop string ended the output, which the core does not know.
        """
        token_ids = update.new_token_ids
        num_taken = len(token_ids)
        if self._text is not None:
            num_taken = self._take_text(token_ids, update.finish_reason, is_whole=update.is_whole)
        if num_taken < len(token_ids):
            token_ids = token_ids[:num_taken]
        self.token_ids += token_ids
        if update.logprobs is not None and self.logprobs is not None:
            self._take_logprobs(update.logprobs[:num_taken])
        if self._text is not None and self._text.stop is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self._text.stop
            return update.finish_reason is None
        self.finish_reason, self.stop_reason = update.finish_reason, update.stop_reason
        return False

    def end(self, reason: FinishReason) -> None:
        """Ends the output from outside: aborted."""
        if self.held is not None:
            held, self.held = self.held, None
            self.take(held)
        if self._text is not None:
            self._take_text((), reason)
        self.finish_reason = reason

    def show(self) -> CompletionOutput:
        """The record for the user, as the kind of output wants it; deltas are forgotten."""
        if self.request.kind == "delta":
            return self._show_delta()
        return self._output("".join(self.pieces), list(self.token_ids), self.logprobs)

    def _show_delta(self) -> CompletionOutput:
        start, self._num_shown_tokens = self._num_shown_tokens, len(self.token_ids)
        logprobs = self.logprobs
        if logprobs is not None:
            self.logprobs = []
        text = "".join(self.pieces)
        self.pieces.clear()
        return self._output(text, self.token_ids[start:], logprobs)

    def _output(
        self, text: str, token_ids: list[int], logprobs: list[TokenLogprobs] | None
    ) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=logprobs,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self.stop_reason,
        )

    def _take_text(
        self,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        *,
        is_whole: bool = False,
    ) -> int:
        assert self._text is not None, self.request_id
        is_stop_token = finish_reason is FinishReason.STOP and not is_whole
        text, count = "", len(token_ids)
        if self._is_text_late:
            if finish_reason is not None:
                all_ids = [*self.token_ids, *token_ids]
                text = self._text.whole(all_ids, is_stop_token=is_stop_token)
        elif finish_reason is None:
            text, count = self._text.append(token_ids)
        else:
            text, count = self._text.finish(token_ids, is_stop_token=is_stop_token)
        if text:
            self.pieces.append(text)
        return count

    def _take_logprobs(self, positions: Sequence[PositionLogprobs]) -> None:
        assert self.logprobs is not None, self.request_id
        assert self.cumulative_logprob is not None, self.request_id
        codec = self.request.prepared.codec
        self.logprobs += [token_logprobs(position, codec) for position in positions]
        self.cumulative_logprob += sum(position.logprob for position in positions)


def token_logprobs(position: PositionLogprobs, codec: TextCodec | None) -> TokenLogprobs:
    """The record for the user: the chosen token first, then the most likely ones."""
    text = None if codec is None else codec.token_text(position.token_id)
    found = {position.token_id: Logprob(position.logprob, position.rank, text)}
    for place, (token_id, logprob) in enumerate(
        zip(position.top_ids, position.top_logprobs, strict=True), 1
    ):
        if token_id not in found:
            text = None if codec is None else codec.token_text(token_id)
            found[token_id] = Logprob(logprob, place, text)
    return found
