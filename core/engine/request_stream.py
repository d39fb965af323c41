"""One request's outputs on their way to an asyncio consumer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from quire.core.engine.messages import same_death
from quire.core.errors import EngineDeadError
from quire.core.outputs import CompletionOutput, RequestOutput


class RequestStream:
    """The outputs of one submitted request.

    Iterate once. A consumer that stops early must call `abort`. A slow consumer finds its
    deltas merged into one output, so that memory is bounded by the output itself.
    """

    def __init__(self, request_id: str, *, is_delta: bool, abort: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._is_delta = is_delta
        self._abort = abort
        self._waiting: RequestOutput | None = None
        self._error: EngineDeadError | None = None
        self._is_over = False
        self._waiter: asyncio.Future[None] | None = None
        """Of the consumer, while there is nothing for it."""

    def put(self, output: RequestOutput) -> None:
        """Takes the next output, from the engine's task."""
        if self._waiting is not None and self._is_delta:
            _merge(self._waiting, output)
        else:
            self._waiting = output
        self._wake()

    def fail(self, error: EngineDeadError) -> None:
        """Ends the stream with an error, after what waits."""
        self._error = error
        self._wake()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output.

        Raises: EngineDeadError. Cancellation does not end the request: `abort` does.
        """
        if self._is_over:
            raise StopAsyncIteration
        while self._waiting is None and self._error is None:
            await self._news()
        output, self._waiting = self._waiting, None
        if output is None:
            assert self._error is not None, self.request_id
            self._is_over = True
            raise same_death(self._error)
        self._is_over = output.is_finished
        return output

    async def _news(self) -> None:
        """Waits for `put` or `fail`: a bare future, since this happens for every token."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def abort(self) -> None:
        """Ends the request in the core too. Harmless after the end."""
        if not self._is_over:
            self._abort(self.request_id)

    async def aclose(self) -> None:
        """`abort`, by the name that generators have."""
        await self.abort()


def _merge(earlier: RequestOutput, later: RequestOutput) -> None:
    """Adds a delta to one that nobody has taken yet."""
    known = {output.index: output for output in earlier.outputs}
    for output in later.outputs:
        if output.index in known:
            _merge_output(known[output.index], output)
        else:
            earlier.outputs.append(output)
    earlier.is_finished = later.is_finished
    earlier.error = later.error
    earlier.num_cached_tokens = later.num_cached_tokens
    if earlier.prompt_logprobs is None:
        earlier.prompt_logprobs = later.prompt_logprobs


def _merge_output(earlier: CompletionOutput, later: CompletionOutput) -> None:
    earlier.text += later.text
    earlier.token_ids = [*earlier.token_ids, *later.token_ids]
    if later.logprobs is not None:
        earlier.logprobs = [*(earlier.logprobs or []), *later.logprobs]
    earlier.cumulative_logprob = later.cumulative_logprob
    earlier.finish_reason = later.finish_reason
    earlier.stop_reason = later.stop_reason
