"""The engine requests of one HTTP request: begun together, merged, never left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from quire.core.engine.async_engine import AsyncEngine, OutputKind, RequestStream
from quire.core.errors import DeviceError
from quire.core.outputs import RequestOutput
from quire.core.sampling_params import SamplingParams
from quire.core.serving.metrics import RequestObserver, ServerMetrics

Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PromptOutput:
    """What came for one of several prompts."""

    prompt_index: int
    output: RequestOutput


@dataclass(frozen=True, slots=True)
class _End:
    """A stream is over."""

    error: BaseException | None


class Generation:
    """Use as a context: leaving it ends in the engine whatever has not ended by itself.

    async with await Generation.begin(...) as generation:
        async for item in generation.outputs(): ...
    """

    def __init__(
        self, streams: Sequence[RequestStream], observers: Sequence[RequestObserver]
    ) -> None:
        self._streams = tuple(streams)
        self._observers = tuple(observers)

    @classmethod
    async def begin(
        cls,
        engine: AsyncEngine,
        metrics: ServerMetrics,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        request_id: str,
        output_kind: OutputKind,
        add_special_tokens: bool,
    ) -> Generation:
        """Submits every prompt, or none.

        Raises: RequestError, QueueFullError, EngineDeadError.
        """
        streams: list[RequestStream] = []
        observers = [
            metrics.observer(num_outputs=params.n, output_kind=output_kind) for _ in prompts
        ]
        try:
            for index, prompt in enumerate(prompts):
                stream = await engine.submit(
                    prompt,
                    params,
                    f"{request_id}-{index}",
                    output_kind=output_kind,
                    add_special_tokens=add_special_tokens,
                )
                streams.append(stream)
        except BaseException:
            await _abort(streams)
            raise
        return cls(streams, observers)

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await _abort(self._streams)
        for observer in self._observers:
            observer.close()

    async def outputs(self) -> AsyncGenerator[PromptOutput]:
        """The outputs of all prompts as they come.

        Raises: DeviceError for a request that failed alone; EngineDeadError.
        """
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield self._noted(PromptOutput(0, output))
            return
        async with aclosing(self._merged()) as merged:
            async for item in merged:
                yield self._noted(item)

    def _noted(self, item: PromptOutput) -> PromptOutput:
        self._observers[item.prompt_index].observe(item.output)
        _raise_failure(item.output)
        return item

    async def _merged(self) -> AsyncGenerator[PromptOutput]:
        # A bound of one a prompt: the engine merges what a slow client leaves waiting.
        queue: asyncio.Queue[PromptOutput | _End] = asyncio.Queue(maxsize=len(self._streams))
        pumps = [asyncio.create_task(_pump(i, s, queue)) for i, s in enumerate(self._streams)]
        try:
            num_open = len(pumps)
            while num_open:
                item = await queue.get()
                if isinstance(item, PromptOutput):
                    yield item
                elif item.error is not None:
                    raise item.error
                else:
                    num_open -= 1
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, stream: RequestStream, queue: asyncio.Queue[PromptOutput | _End]
) -> None:
    error: BaseException | None = None
    try:
        async for output in stream:
            await queue.put(PromptOutput(index, output))
    except Exception as failure:
        error = failure
    await queue.put(_End(error))


async def _abort(streams: Sequence[RequestStream]) -> None:
    """Ends the requests, also if one of them cannot be ended; harmless for those that are over."""
    await asyncio.gather(*(stream.abort() for stream in streams), return_exceptions=True)


def _raise_failure(output: RequestOutput) -> None:
    has_failed = output.error is not None
    for child in output.outputs:
        has_failed = has_failed or child.finish_reason == "error"
    if has_failed:
        raise DeviceError(output.error or "the request failed in the engine")
