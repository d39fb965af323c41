"""What every request passes on its way in: an id, the key, the limit of its size, and the gate."""

from __future__ import annotations

import hmac
import re
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.core.serving.error_responses import Failure, HttpError
from quire.core.serving.gate import Gate

OPEN_PATHS = frozenset({"/health", "/ready", "/version", "/metrics"})
"""What may be asked without a key: it tells nothing of anybody's requests."""
_GENERATING = frozenset({"/v1/completions", "/v1/chat/completions"})
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


class RequestIdMiddleware:
    """Gives each request an id, the client's own where it is a sound one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class ApiKeyMiddleware:
    """Lets only those in who send a key, but for the paths that anybody may ask."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        is_free = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        # Browsers ask without a key whether they may send one.
        if is_free or scope["method"] == "OPTIONS" or self._is_known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        failure = Failure(
            status=401,
            message="the API key is missing or wrong; send `Authorization: Bearer KEY`",
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await failure.response()(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1", "replace")
        # All keys are compared, each in constant time, so that the answer's time tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


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
            await self._too_large().response()(scope, receive, send)
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
        if scope["type"] != "http" or scope["path"] not in _GENERATING:
            await self._app(scope, receive, send)
            return
        try:
            with self._gate.entered():
                await self._app(scope, receive, send)
        except HttpError as error:
            await error.failure.response()(scope, receive, send)
