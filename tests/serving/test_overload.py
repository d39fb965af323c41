"""More than the server can do: the real engine on the null device, which answers at once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from tiny_models import make_tiny_model

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine
from quire.core.serving.http.app import make_app
from quire.core.serving.settings import ServerSettings

pytestmark = pytest.mark.timeout(300)

RUNNING, QUEUED, TOKENS = 4, 4, 8
BODY = {"prompt": [5, 6, 7], "max_tokens": TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("overload") / "llama")


@asynccontextmanager
async def null_server(model: Path) -> AsyncIterator[tuple[httpx.AsyncClient, AsyncEngine]]:
    """A server around a real engine core in its own process, on the device that computes nothing."""
    config = EngineConfig(
        model=str(model),
        device="null",
        max_num_seqs=RUNNING,
        max_num_queued=QUEUED,
        served_model_name="m",
    )
    engine = await AsyncEngine.start(config)
    try:
        transport = httpx.ASGITransport(app=make_app(engine, ServerSettings()))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://s", timeout=60
        ) as client:
            yield client, engine
    finally:
        await engine.shutdown()


async def test_overload_by_ten_answers_what_it_lets_in_and_refuses_the_rest(model):
    """Ten times capacity at once: nothing is lost, what is let in is whole, the rest hears 429 at once."""
    async with null_server(model) as (client, engine):
        asked = 10 * (RUNNING + QUEUED)
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=BODY) for _ in range(asked))
        )
        counts = Counter(answer.status_code for answer in answers)
        assert set(counts) <= {200, 429}
        assert counts[200] >= RUNNING + QUEUED
        assert counts[429] > 0
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == TOKENS
            else:
                assert int(answer.headers["retry-after"]) >= 1
        assert engine.num_unfinished == 0
        statistics = await engine.statistics()
        assert (statistics.num_running, statistics.num_waiting) == (0, 0)
        assert statistics.num_output_tokens == counts[200] * TOKENS


@pytest.mark.slow
async def test_overload_with_retries_answers_everybody(model):
    """Clients that come back as they are told are all answered, and the engine does no work twice."""
    async with null_server(model) as (client, engine):

        async def insist() -> int:
            for tries in range(10_000):
                if (await client.post("/v1/completions", json=BODY)).status_code == 200:
                    return tries
                # In one process a refusal waits for nothing: without this nobody else has a turn.
                await asyncio.sleep(0)
            raise AssertionError("never let in")

        number = 10 * RUNNING
        await asyncio.gather(*(insist() for _ in range(number)))
        statistics = await engine.statistics()
        assert statistics.num_output_tokens == number * TOKENS
        assert statistics.num_preemptions == 0


@pytest.mark.slow
async def test_cut_off_streams_leave_nothing_behind(model):
    """A third of the streams is cut off in the middle; no request and no block is left."""
    async with null_server(model) as (client, engine):

        async def ask(index: int) -> int:
            body = {**BODY, "max_tokens": 100, "stream": True}
            try:
                async with asyncio.timeout(0.01 if index % 3 == 0 else 60):
                    response = await client.post("/v1/completions", json=body)
            except TimeoutError:
                return 0
            assert response.status_code in {200, 429}
            if response.status_code == 200:
                events = [
                    line for line in response.text.split("\n\n") if line.startswith("data: {")
                ]
                assert (
                    json.loads(events[-1].removeprefix("data: "))["choices"][0]["finish_reason"]
                    == "length"
                )
            return 1

        for _ in range(5):
            await asyncio.gather(*(ask(index) for index in range(RUNNING + QUEUED)))
        statistics = await engine.statistics()
        while statistics.num_running or statistics.num_waiting:
            statistics = await engine.statistics()
        assert engine.num_unfinished == 0
        assert statistics.cache_usage == 0.0
