"""Requests to a server, in time, and what was seen of each answer."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from quire.core.errors import ConfigError
from quire.core.serving.cli.bench.prompts import random_prompts, read_prompts
from quire.core.serving.cli.bench.report import distribution

_SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and 12 pumpkins follow it to Oslo: why? (x+y) = z"
)
"""Tokens of this text are what random prompts are drawn from: every vocabulary has them."""


@dataclass(slots=True)
class RequestRecord:
    """What was seen of one request."""

    sent_s: float
    chunk_times_s: list[float] = field(default_factory=list)
    """When text came."""
    end_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    error: str = ""

    def times_s(self, name: str) -> list[float]:
        """The values of `time_to_first_token`, `inter_token` or `request`."""
        if name == "request":
            return [self.end_s - self.sent_s]
        if not self.chunk_times_s:
            return []
        if name == "time_to_first_token":
            return [self.chunk_times_s[0] - self.sent_s]
        # Several tokens may come in one chunk: the span is shared by the tokens, not by the chunks.
        span_s = self.chunk_times_s[-1] - self.chunk_times_s[0]
        num_gaps = max(self.num_output_tokens - 1, len(self.chunk_times_s) - 1)
        if num_gaps == len(self.chunk_times_s) - 1:
            pairs = zip(self.chunk_times_s, self.chunk_times_s[1:], strict=False)
            return [after - before for before, after in pairs]
        return [span_s / num_gaps] * num_gaps


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be sent where, and how fast."""

    url: str
    model: str | None
    output_len: int
    request_rate: float | None
    max_concurrency: int | None
    api_key: str | None
    timeout_s: float
    seed: int

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Target]:
        """The server, asked for its model. Raises: ConfigError if it does not answer."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=self.timeout_s, limits=limits
        ) as client:
            yield Target(load=self, client=client, model=self.model or await _first_model(client))


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server under load."""

    load: Load
    client: httpx.AsyncClient
    model: str

    async def token_ids(self) -> list[int]:
        """Ids for random prompts. Raises: ConfigError where the server has no /tokenize."""
        body = {"model": self.model, "prompt": _SAMPLE, "add_special_tokens": False}
        response = await self.client.post("/tokenize", json=body)
        if response.status_code != httpx.codes.OK:
            raise ConfigError(
                f"{self.load.url}/tokenize answers {response.status_code}, so that random tokens "
                "cannot be made; give --prompts-file"
            )
        return sorted(set(response.json()["tokens"]))

    async def send_all(self, prompts: Sequence[Any]) -> list[RequestRecord]:
        """All requests, at the asked rate and concurrency."""
        rng = random.Random(self.load.seed)
        limit = asyncio.Semaphore(self.load.max_concurrency or len(prompts))
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(self._send_within(limit, prompt)))
            if self.load.request_rate is not None:
                await asyncio.sleep(rng.expovariate(self.load.request_rate))
        return list(await asyncio.gather(*tasks))

    async def _send_within(self, limit: asyncio.Semaphore, prompt: Any) -> RequestRecord:
        async with limit:
            return await self._send(prompt)

    async def _send(self, prompt: Any) -> RequestRecord:
        record = RequestRecord(sent_s=time.monotonic())
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.load.output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                await _read(response, record)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            record.error = f"{type(error).__name__}: {error}"
        record.end_s = time.monotonic()
        return record


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape:
    """Which prompts are sent."""

    number: int
    length: int
    """Tokens of a random one."""
    file: Path | None
    """Given ones instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """All that was seen."""

    model: str
    records: list[RequestRecord]
    elapsed_s: float

    @property
    def errors(self) -> list[str]:
        """What failed requests said, each thing once."""
        return sorted({record.error for record in self.records if record.error})


async def measure(load: Load, shape: PromptShape) -> Measurement:
    """Sends everything and waits for the last answer.

    Raises: ConfigError if no server answers or no prompts can be made.
    """
    async with load.connected() as target:
        prompts: Sequence[Any]
        if shape.file is None:
            ids = await target.token_ids()
            prompts = random_prompts(shape.number, shape.length, ids, load.seed)
        else:
            prompts = read_prompts(shape.file, shape.number)
        begun_s = time.monotonic()
        records = await target.send_all(prompts)
        elapsed_s = time.monotonic() - begun_s
        return Measurement(model=target.model, records=records, elapsed_s=elapsed_s)


def numbers_of(seen: Measurement) -> dict[str, float | int]:
    """Counts, rates, and the distributions of the times of requests that did not fail."""
    numbers = summarize(seen.records, seen.elapsed_s)
    for name in ("time_to_first_token", "inter_token", "request"):
        values = [v for record in seen.records if not record.error for v in record.times_s(name)]
        numbers |= distribution(name, values)
    return numbers


def summarize(records: Sequence[RequestRecord], elapsed_s: float) -> dict[str, float | int]:
    """Counts and rates of all requests together."""
    good = [record for record in records if not record.error]
    num_output = sum(record.num_output_tokens for record in good)
    num_prompt = sum(record.num_prompt_tokens for record in good)
    return {
        "requests": len(records),
        "failed_requests": len(records) - len(good),
        "elapsed_s": elapsed_s,
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "requests_per_s": len(good) / elapsed_s,
        "output_tokens_per_s": num_output / elapsed_s,
        "total_tokens_per_s": (num_prompt + num_output) / elapsed_s,
    }


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise ConfigError(
            f"no server answers at {client.base_url}: {error}; start one with `quire serve MODEL`, "
            "or name the address with --url"
        ) from error


async def _read(response: httpx.Response, record: RequestRecord) -> None:
    if response.status_code != httpx.codes.OK:
        await response.aread()
        record.error = f"status {response.status_code}: {response.text[:200]}"
        return
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            continue
        now_s = time.monotonic()
        chunk = json.loads(data)
        if "error" in chunk:
            record.error = str(chunk["error"].get("message"))
            return
        if chunk.get("choices"):
            record.chunk_times_s.append(now_s)
        usage = chunk.get("usage")
        if usage:
            record.num_prompt_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]
