"""Ends requests that take longer than they may."""

from __future__ import annotations

import asyncio
import math

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.http.error_styles import last_event_for, response_to

HEADER = "x-request-timeout"
"""Seconds, by which a client asks for a shorter time than the server's."""


class DeadlineMiddleware:
    """Cancels a request at its deadline: 504, or an event with the error in a stream.

    What was asked of the engine ends with it, as when the client leaves.
    """

    def __init__(self, app: ASGIApp, *, limit_s: float | None) -> None:
        """`limit_s` holds for all requests; None: only clients set deadlines."""
        self._app = app
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            limit_s = _limit_of(Headers(scope=scope).get(HEADER), self._limit_s)
        except HttpError as error:
            await response_to(scope, error.failure)(scope, receive, send)
            return
        if limit_s is None:
            await self._app(scope, receive, send)
            return
        sent = _Sent(send)
        try:
            async with asyncio.timeout(limit_s) as timer:
                await self._app(scope, receive, sent)
        except TimeoutError:
            if not timer.expired():
                raise
            await self._tell(limit_s, sent, scope, receive)

    async def _tell(self, limit_s: float, sent: _Sent, scope: Scope, receive: Receive) -> None:
        failure = Failure(
            status=504,
            message=f"the request took longer than its {limit_s:g} s",
            type="timeout_error",
            code="deadline_exceeded",
        )
        if not sent.has_begun:
            await response_to(scope, failure)(scope, receive, sent)
        elif sent.is_events and not sent.is_over:
            body = last_event_for(scope, failure)
            await sent({"type": "http.response.body", "body": body, "more_body": False})


class _Sent:
    """Passes messages on and remembers how far the response has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = self.is_events = self.is_over = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            kind = Headers(raw=message.get("headers", [])).get("content-type", "")
            self.is_events = kind.startswith("text/event-stream")
        elif not message.get("more_body", False):
            self.is_over = True
        await self._send(message)


def _limit_of(asked: str | None, limit_s: float | None) -> float | None:
    """The shorter of both. Raises: HttpError (400) for a header that is no number of seconds."""
    if asked is None:
        return limit_s
    try:
        seconds = float(asked)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise HttpError(
            Failure(
                status=400,
                message=f"the header {HEADER} must be a number of seconds above 0",
                param=HEADER,
            )
        )
    return seconds if limit_s is None else min(seconds, limit_s)
