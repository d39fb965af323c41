"""Updates of the core to outputs for users."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from quire.core.engine.input_processor import PreparedRequest
from quire.core.engine.output_state import OutputKind, OutputState, RequestState, Sink
from quire.core.errors import RequestError
from quire.core.scheduler.request import FinishReason, RequestUpdate

_PIECES_PER_S = 800.0
"""Of all streams together, beyond which handing over takes more of a core than the text in them."""
_LONGEST_INTERVAL_S = 0.1
"""What still reads as it is written."""


class OutputProcessor:
    """Follows every request in flight and hands each output to its request's sink.

    With `stream_interval_s` above 0 a stream's pieces come no faster than that: tokens in between
    are handed over together, with the next piece, in `flush` or at the end. First tokens and ends
    never wait. Each piece costs its reader a wake-up, a message and often a packet, which many
    streams at once feel and no reader does. Where so many stream that even so pieces would come
    faster than `_PIECES_PER_S`, each waits longer, `_LONGEST_INTERVAL_S` at most.
    """

    def __init__(self, *, stream_interval_s: float = 0.0) -> None:
        self._requests: dict[str, RequestState] = {}
        self._outputs: dict[str, OutputState] = {}
        self._stream_interval_s = stream_interval_s
        self._holding: dict[str, OutputState] = {}
        """Outputs that hold tokens back."""

    @property
    def num_unfinished(self) -> int:
        """Requests in flight, as users count them."""
        return len(self._requests)

    @property
    def num_unfinished_outputs(self) -> int:
        """Requests in flight, as the core counts them: each of `n` is one."""
        return len(self._outputs)

    @property
    def request_ids(self) -> list[str]:
        """Ids of the requests in flight."""
        return list(self._requests)

    def add(self, prepared: PreparedRequest, kind: OutputKind, sink: Sink) -> None:
        """Follows a request from here on. Raises: RequestError if one of its id is in flight."""
        ids = [spec.request_id for spec in prepared.specs]
        if prepared.request_id in self._requests or any(one in self._outputs for one in ids):
            raise RequestError(
                f"request_id {prepared.request_id!r} is in flight already; choose another",
                param="request_id",
            )
        state = RequestState(prepared, kind, sink)
        self._requests[prepared.request_id] = state
        for child in state.children:
            self._outputs[child.request_id] = child

    def process(self, updates: Sequence[RequestUpdate]) -> list[str]:
        """Takes one step's updates.

        Returns ids that the core must abort, since a stop string ended them.
        """
        to_abort: list[str] = []
        outputs = self._outputs
        interval_s = self._interval_s()
        now = time.monotonic()
        for update in updates:
            output = outputs.get(update.request_id)
            if output is None:
                continue  # ended here before the core knew
            metrics = output.request.metrics
            if metrics.first_token_time_s is None and update.new_token_ids:
                self._note_first_token(output.request, update, now)
            metrics.last_token_time_s = now
            if output.is_silent and update.finish_reason is None:
                output.token_ids += update.new_token_ids
            elif now - output.shown_time_s < interval_s and _may_wait(output, update):
                output.hold(update)
                self._holding[update.request_id] = output
            elif self._take(output, output.with_held(update), now):
                to_abort.append(update.request_id)
        return to_abort

    def flush(self) -> float | None:
        """Hands over what was held for long enough.

        Returns the seconds until more is due, None if nothing is held.
        """
        now = time.monotonic()
        interval_s = self._interval_s()
        wait_s: float | None = None
        for output in list(self._holding.values()):
            left_s = output.shown_time_s + interval_s - now
            if output.held is None:
                del self._holding[output.request_id]
            elif left_s <= 0.0:
                del self._holding[output.request_id]
                held, output.held = output.held, None
                self._take(output, held, now)
            else:
                wait_s = left_s if wait_s is None else min(wait_s, left_s)
        return wait_s

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Ends requests.

        Each gets a last output. Returns ids that the core must abort. Unknown ids are
        ignored.
        """
        to_abort: list[str] = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is None:
                continue
            unfinished = [child for child in request.children if child.finish_reason is None]
            for child in unfinished:
                child.end(FinishReason.ABORT)
                to_abort.append(child.request_id)
                self._drop(child, time.monotonic())
            self._show(request, unfinished)
        return to_abort

    def forget_all(self) -> list[RequestState]:
        """Drops everything without an output, and returns what was in flight: the core is gone."""
        requests = list(self._requests.values())
        self._requests.clear()
        self._outputs.clear()
        self._holding.clear()
        return requests

    def _interval_s(self) -> float:
        """Seconds between the pieces of a stream, with as many in flight as there are."""
        asked_s = self._stream_interval_s
        if asked_s == 0.0:
            return 0.0
        return max(asked_s, min(len(self._outputs) / _PIECES_PER_S, _LONGEST_INTERVAL_S))

    def _note_first_token(self, request: RequestState, update: RequestUpdate, now: float) -> None:
        request.metrics.first_token_time_s = now
        request.metrics.first_scheduled_time_s = update.first_scheduled_time_s
        request.num_cached_tokens = update.num_cached_tokens

    def _take(self, output: OutputState, update: RequestUpdate, now: float) -> bool:
        request = output.request
        if update.prompt_logprobs and request.wants_prompt_logprobs:
            request.take_prompt_logprobs(update.prompt_logprobs)
        is_stopped_here = output.take(update)
        if update.error is not None:
            request.error = update.error
        if output.finish_reason is not None:
            request.metrics.num_preemptions += update.num_preemptions
            self._drop(output, now)
        if update.new_token_ids or output.finish_reason is not None:
            output.shown_time_s = now
            self._show(request, [output])
        return is_stopped_here

    def _drop(self, output: OutputState, now: float) -> None:
        del self._outputs[output.request_id]
        self._holding.pop(output.request_id, None)
        request = output.request
        request.num_unfinished -= 1
        if request.num_unfinished == 0:
            request.metrics.finished_time_s = now
            del self._requests[request.prepared.request_id]

    def _show(self, request: RequestState, changed: list[OutputState]) -> None:
        if request.kind == "final":
            if request.num_unfinished:
                return
            changed = request.children
        elif request.kind == "cumulative":
            changed = request.children
        request.sink(request.output([output.show() for output in changed]))


def _may_wait(output: OutputState, update: RequestUpdate) -> bool:
    """Whether an update can be handed over together with the next."""
    return output.is_patient and update.finish_reason is None and not update.prompt_logprobs
