"""Requests to a server, in time, and what was seen of each answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from quire.core.errors import ConfigError
from quire.core.serving.cli.bench.arrivals import Arrivals
from quire.core.serving.cli.bench.datasets import Question, make_questions, read_questions
from quire.core.serving.cli.bench.prompts import random_prompts
from quire.core.serving.cli.bench.report import distribution

_SAMPLE = (
    "The quick brown fox jumps over the lazy dog, and 12 pumpkins follow it to Oslo: why? (x+y) = z"
)
"""Tokens of this text are what random prompts are drawn from: every vocabulary has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What makes an answer good; None: that does not matter."""

    first_token_ms: float | None = None
    inter_token_ms: float | None = None
    """Of one answer, the mean between its tokens."""


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
    status: int = 0
    """Of the response; 0: none came."""

    def meets(self, limits: Limits) -> bool:
        """Whether this answer was good: whole, its first token in time, and the others too."""
        if self.error or not self.chunk_times_s:
            return False
        first_ms = (self.chunk_times_s[0] - self.sent_s) * 1000.0
        gaps = self.times_s("inter_token")
        gap_ms = sum(gaps) / len(gaps) * 1000.0 if gaps else 0.0
        is_begun = limits.first_token_ms is None or first_ms <= limits.first_token_ms
        return is_begun and (limits.inter_token_ms is None or gap_ms <= limits.inter_token_ms)

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
    is_chat: bool = False
    """Ask `/v1/chat/completions`; else `/v1/completions`."""
    ignores_eos: bool = True
    """Sends `ignore_eos`, which servers of the plain API may refuse."""
    arrivals: Arrivals
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
        """Ids for random prompts; none where the server has no /tokenize, as many do not."""
        body = {"model": self.model, "prompt": _SAMPLE, "add_special_tokens": False}
        response = await self.client.post("/tokenize", json=body)
        if response.status_code != httpx.codes.OK:
            return []
        return sorted(set(response.json()["tokens"]))

    async def send_all(self, questions: Sequence[Question]) -> list[RequestRecord]:
        """All requests, at the asked rate and concurrency."""
        limit = asyncio.Semaphore(self.load.max_concurrency or len(questions))
        begun_s, due_s = time.monotonic(), 0.0
        tasks = []
        for question, gap_s in zip(questions, self.load.arrivals.gaps_s(), strict=False):
            tasks.append(asyncio.create_task(self._send_within(limit, question)))
            due_s += gap_s
            # Held to the plan, not to the last sleep: a late one does not delay all others.
            await asyncio.sleep(max(0.0, begun_s + due_s - time.monotonic()))
        return list(await asyncio.gather(*tasks))

    async def _send_within(self, limit: asyncio.Semaphore, question: Question) -> RequestRecord:
        async with limit:
            return await self._send(question)

    async def _send(self, question: Question) -> RequestRecord:
        record = RequestRecord(sent_s=time.monotonic())
        body = {
            "model": self.model,
            **question.body(is_chat=self.load.is_chat),
            "max_tokens": question.output_len or self.load.output_len,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.load.ignores_eos:
            body["ignore_eos"] = True
        path = "/v1/chat/completions" if self.load.is_chat else "/v1/completions"
        try:
            async with self.client.stream("POST", path, json=body) as response:
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
    dataset: str = "random"
    """What is made where no file is given."""


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
        questions = await _questions(target, shape)
        begun_s = time.monotonic()
        records = await target.send_all(questions)
        elapsed_s = time.monotonic() - begun_s
        return Measurement(model=target.model, records=records, elapsed_s=elapsed_s)


async def _questions(target: Target, shape: PromptShape) -> list[Question]:
    load = target.load
    if shape.file is not None:
        return read_questions(shape.file, shape.number)
    if shape.dataset == "random" and not load.is_chat and (ids := await target.token_ids()):
        prompts = random_prompts(shape.number, shape.length, ids, load.seed)
        return [Question(prompt=prompt) for prompt in prompts]
    return make_questions(shape.dataset, shape.number, shape.length, load.seed)


def goodput_of(seen: Measurement, limits: Limits) -> dict[str, float | int]:
    """Good answers, their part of all, and how many a second; nothing where nothing is limited."""
    if limits == Limits():
        return {}
    good = sum(record.meets(limits) for record in seen.records)
    return {
        "good_requests": good,
        "good_part": good / max(len(seen.records), 1),
        "goodput_requests_per_s": good / seen.elapsed_s,
    }


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
        "refused_requests": sum(r.status == httpx.codes.TOO_MANY_REQUESTS for r in records),
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
    record.status = response.status_code
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
        if any(map(_says_something, chunk.get("choices", ()))):
            record.chunk_times_s.append(now_s)
        usage = chunk.get("usage")
        if usage:
            record.num_prompt_tokens = usage["prompt_tokens"]
            record.num_output_tokens = usage["completion_tokens"]


def _says_something(choice: dict[str, Any]) -> bool:
    """A chat begins with a chunk that only names the role."""
    delta = choice.get("delta")
    return delta is None or "role" not in delta or bool(delta.get("content"))
