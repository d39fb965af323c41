"""Server-sent events: the format, and the response that sends them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from quire.core.serving.disconnect import run_while_connected
from quire.core.serving.error_responses import failure_of

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
"""The last event of every stream."""


def event(data: bytes) -> bytes:
    """One event. `data` is JSON, which has no line breaks of its own."""
    return b"data: " + data + b"\n\n"


class EventStream(Response):
    """Sends the JSON bodies of a generator as events, then `[DONE]`.

    An error in mid-stream becomes an event with the body of an error: the status is sent already.
    However it ends (the client leaves, the server is cancelled), the generator is closed and then
    its `owner` is left, even if the generator was never begun.
    """

    media_type = "text/event-stream"

    def __init__(
        self, bodies: AsyncGenerator[bytes], owner: AbstractAsyncContextManager[Any]
    ) -> None:
        # Proxies must neither keep events nor hold them back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._bodies = bodies
        self._owner = owner

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
        try:
            async for body in self._bodies:
                await send({"type": "http.response.body", "body": event(body), "more_body": True})
        except OSError:
            raise
        except Exception as error:
            failed = event(failure_of(error).body())
            await send({"type": "http.response.body", "body": failed, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
