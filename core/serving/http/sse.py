"""Server-sent events: the format, and the response that sends them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.error_responses import failure_of

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
"""The last event of every stream of completions."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which every client skips."""
KEEP_ALIVE_S = 15.0
"""Proxies close what is silent for a minute, or for thirty seconds."""


def event(data: bytes) -> bytes:
    """One event. `data` is JSON, which has no line breaks of its own."""
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """One event of a stream in which they have names."""
    return b"event: " + name.encode() + b"\n" + event(data)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamStyle:
    """How one API writes its streams."""

    frame: Callable[[bytes], bytes] = event
    """Makes an event of what the generator yields."""
    failed: Callable[[Exception], bytes] = lambda error: event(failure_of(error).body())
    """The event that tells of an error in mid-stream; the status is sent already."""
    end: bytes = DONE
    keep_alive: bytes = KEEP_ALIVE
    """Sent where nothing else was for a while, as during a long prompt."""


COMPLETIONS_STYLE = StreamStyle()
NAMED_STYLE = StreamStyle(frame=lambda framed: framed, end=b"")
"""Of generators that frame their events themselves and end with an event of their own."""


class EventStream(Response):
    """Sends what a generator yields as events, in the style of one API.

    An error in mid-stream becomes an event with the body of an error: the status is sent already.
    However it ends (the client leaves, the server is cancelled), the generator is closed and then
    its `owner` is left, even if the generator was never begun. The generator is asked for no more
    than the client takes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        bodies: AsyncGenerator[bytes],
        owner: AbstractAsyncContextManager[Any],
        *,
        style: StreamStyle = COMPLETIONS_STYLE,
        keep_alive_s: float = KEEP_ALIVE_S,
    ) -> None:
        # Proxies must neither keep events nor hold them back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._bodies = bodies
        self._owner = owner
        self._style = style
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything, or as much as the client waits for."""
        async with self._owner, aclosing(self._bodies):
            try:
                await run_while_connected(receive, self._send(send))
            except (ClientDisconnect, OSError):
                logger.info("the client left a stream")

    async def _send(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        wire = _Wire(send)
        ticker = asyncio.create_task(wire.keep_alive(self._style.keep_alive, self._keep_alive_s))
        try:
            await self._send_bodies(wire)
        finally:
            ticker.cancel()
            await asyncio.gather(ticker, return_exceptions=True)
        await send({"type": "http.response.body", "body": self._style.end, "more_body": False})

    async def _send_bodies(self, wire: _Wire) -> None:
        try:
            async for body in self._bodies:
                await wire.write(self._style.frame(body))
        except OSError:
            raise
        except Exception as error:
            await wire.write(self._style.failed(error))


class _Wire:
    """Writes whole events, one at a time, and knows when the last one went out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._is_writing = False
        self._num_written = 0

    async def write(self, data: bytes) -> None:
        """Waits for a client that is slow to take what it was sent."""
        self._num_written += 1
        self._is_writing = True
        # What is sent is handed over whole before anything is waited for: two cannot mix.
        await self._send({"type": "http.response.body", "body": data, "more_body": True})
        self._is_writing = False

    async def keep_alive(self, data: bytes, interval_s: float) -> None:
        """Writes `data` after every interval in which nothing was written. Runs until cancelled."""
        seen = self._num_written
        while True:
            await asyncio.sleep(interval_s)
            # A client that is slow to take an event has something to read already.
            if seen == self._num_written and not self._is_writing:
                await self.write(data)
            seen = self._num_written
