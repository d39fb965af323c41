"""Runs an engine for the length of a command."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from quire.core.serving.cli.console import err, size

if TYPE_CHECKING:
    from quire.core.config import EngineConfig
    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.outputs import RequestOutput
    from quire.core.sampling_params import SamplingParams

Result = TypeVar("Result")


def run_engine(config: EngineConfig, work: Callable[[AsyncEngine], Awaitable[Result]]) -> Result:
    """Starts an engine, does `work` with it and ends it.

    Raises: what the start raises, and what `work` raises.
    """

    async def run() -> Result:
        async with started(config) as engine:
            return await work(engine)

    return asyncio.run(run())


@asynccontextmanager
async def started(config: EngineConfig) -> AsyncIterator[AsyncEngine]:
    """An engine that lives as long as the block, with its start shown on stderr."""
    from quire.core.engine.async_engine import AsyncEngine

    console = err()
    begun_s = time.monotonic()
    with console.status(f"loading {config.model}"):
        engine = await AsyncEngine.start(config)
    try:
        console.print(
            describe(engine, time.monotonic() - begun_s), style="dim", markup=False, soft_wrap=True
        )
        yield engine
    finally:
        await engine.shutdown()


def describe(engine: AsyncEngine, start_s: float) -> str:
    """What was loaded and where, in one line."""
    facts = engine.facts
    return (
        f"{facts.model}: {facts.architecture}, {facts.num_parameters / 1e6:,.1f}M parameters "
        f"({size(facts.weight_bytes)} {facts.dtype}) on {facts.device} ({facts.device_name}), "
        f"cache for {facts.num_cache_tokens:,} tokens, ready in {start_s:.1f} s"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """Finished outputs, in the order of the prompts, and how long all took."""

    outputs: list[RequestOutput]
    elapsed_s: float

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_output_tokens(self) -> int:
        """Of all outputs."""
        return sum(len(child.token_ids) for output in self.outputs for child in output.outputs)

    @property
    def output_tokens_per_s(self) -> float:
        """The throughput."""
        return self.num_output_tokens / max(self.elapsed_s, 1e-9)


async def run_batch(
    engine: AsyncEngine,
    prompts: Sequence[Any],
    params: SamplingParams,
    *,
    name: str = "batch",
    add_special_tokens: bool = True,
) -> BatchResult:
    """All prompts at once.

    Raises: RequestError; EngineDeadError; DeviceError for a request that failed alone.
    """
    begun_s = time.monotonic()
    waits = [
        _run_one(engine, prompt, params, f"{name}-{index}", add_special_tokens)
        for index, prompt in enumerate(prompts)
    ]
    outputs = await asyncio.gather(*waits)
    return BatchResult(outputs=list(outputs), elapsed_s=time.monotonic() - begun_s)


async def _run_one(
    engine: AsyncEngine,
    prompt: Any,
    params: SamplingParams,
    request_id: str,
    add_special_tokens: bool,
) -> RequestOutput:
    from quire.core.errors import DeviceError

    last: RequestOutput | None = None
    async for output in engine.generate(
        prompt, params, request_id, output_kind="final", add_special_tokens=add_special_tokens
    ):
        last = output
    assert last is not None, request_id
    if last.error is not None:
        raise DeviceError(f"request {request_id} failed: {last.error}")
    return last
