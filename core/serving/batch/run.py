"""Answers the lines of a batch, so many at once, over HTTP or against an application."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from quire.core.errors import QuireError
from quire.core.serving.batch.lines import BatchAnswer, BatchLine

_AGAIN = frozenset({408, 429, 502, 503, 504})
"""Statuses that say: not now."""
_MAX_WAIT_S = 30.0


class BatchStoppedError(QuireError):
    """The server does not answer any more; what is answered is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRunner:
    """Sends lines and hands out answers."""

    client: httpx.AsyncClient
    concurrency: int
    """Lines in flight."""
    max_retries: int
    """How often a line is sent again that met a server without room or was not answered."""
    first_wait_s: float = 0.5
    """Before the first of these times; it doubles."""

    async def run(
        self, lines: Iterator[BatchLine], on_answer: Callable[[BatchAnswer], None]
    ) -> None:
        """Sends every line, and calls `on_answer` as each is answered, in no order.

        Raises: BatchStoppedError if the server is gone, or has no room for too long.
        """
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(self._work(lines, on_answer))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _work(
        self, lines: Iterator[BatchLine], on_answer: Callable[[BatchAnswer], None]
    ) -> None:
        for line in lines:
            on_answer(await self._answer(line))

    async def _answer(self, line: BatchLine) -> BatchAnswer:
        wait_s, problem = self.first_wait_s, ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                # Spread, so that lines that were refused together do not come back together.
                await asyncio.sleep(wait_s * (0.5 + random.random()))
                wait_s = min(2 * wait_s, _MAX_WAIT_S)
            try:
                response = await self.client.post(line.url, json=line.body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            body = _json_of(response)
            if response.status_code not in _AGAIN:
                request_id = response.headers.get("x-request-id", "")
                return BatchAnswer(line.custom_id, response.status_code, request_id, body)
            problem = f"status {response.status_code}: {str(body)[:200]}"
            if _is_dead(body):
                break
        raise BatchStoppedError(
            f"the server does not answer {line.custom_id!r} ({problem}); what is answered is "
            "kept, run the same command again to go on"
        )


def _json_of(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return {"error": {"message": response.text[:2000], "type": "server_error"}}


def _is_dead(body: Any) -> bool:
    """Whether waiting helps nothing."""
    error = body.get("error") if isinstance(body, dict) else None
    return isinstance(error, dict) and error.get("code") == "engine_dead"
