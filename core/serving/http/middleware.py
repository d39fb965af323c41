"""What every request passes on its way in: an id, the limit of its size, and the gate."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.http.error_styles import response_to
from quire.core.serving.http.gate import Gate
from quire.core.serving.operations.record import RequestRecord, path_of

_GENERATING = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        *("/", "/generate", "/generate_stream", "/v1/embeddings", "/pooling", "/classify"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
        *("/v1/audio/transcriptions", "/v1/audio/translations"),
    }
)
"""Paths on which the engine works for a client, asked with POST."""
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class RequestIdMiddleware:
    """Gives each request an id, the client's own where it is a sound one, and sends it back.

    With the id begins the record of the request, which logs, traces and limits read.
    """

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        """`root_path`: the prefix under which a proxy shows the server, kept on or taken off."""
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path:
            scope["root_path"] = self._root_path
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        record = RequestRecord(request_id=request_id)
        scope.setdefault("state", {}).update(request_id=request_id, record=record)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class BodyLimitMiddleware:
    """Refuses bodies above a size, by their announced length or as they come."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > self._max_bytes:
            await response_to(scope, self._too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def receive_limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HttpError(self._too_large())
            return message

        await self._app(scope, receive_limited, send)

    def _too_large(self) -> Failure:
        return Failure(
            status=413,
            message=f"the body is larger than {self._max_bytes} bytes; send less at once",
            code="body_too_large",
            headers={"Connection": "close"},
        )


class GateMiddleware:
    """Counts requests for tokens until their last byte; turns them away once the gate is closed."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if not _generates(scope):
            await self._app(scope, receive, send)
            return
        try:
            with self._gate.entered():
                await self._app(scope, receive, send)
        except HttpError as error:
            await response_to(scope, error.failure)(scope, receive, send)


def _generates(scope: Scope) -> bool:
    is_post = scope["type"] == "http" and scope["method"] == "POST"
    return is_post and path_of(scope) in _GENERATING
