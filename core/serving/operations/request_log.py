"""One line for each request, and the request's id on every other line that it causes."""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.core.serving.operations.record import RequestRecord, path_of, record_of

access_logger = logging.getLogger("quire.access")

_request_id: ContextVar[str | None] = ContextVar("quire_request_id", default=None)
"""For log lines alone: nothing is decided by it."""
_MAX_LOGGED_BODY = 65536
_QUIET = frozenset({"/health", "/ready", "/live", "/ping", "/metrics", "/load", "/v1/server"})
"""What somebody asks every few seconds is told at level debug."""
_EXTRA = "fields"


class RequestLogMiddleware:
    """Tells who asked what, with which end. A prompt is told only if the operator wants it."""

    def __init__(self, app: ASGIApp, *, logs_requests: bool, logs_prompts: bool) -> None:
        self._app = app
        self._logs_requests = logs_requests
        self._logs_prompts = logs_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        record = record_of(scope)
        if scope["type"] != "http" or record is None:
            await self._app(scope, receive, send)
            return
        level = logging.DEBUG if path_of(scope) in _QUIET else logging.INFO
        token = _request_id.set(record.request_id)
        if not self._logs_requests:
            await self._pass_on(token, scope, receive, send)
            return
        body = bytearray()

        async def receive_noted() -> Message:
            message = await receive()
            if self._logs_prompts:
                body.extend(message.get("body", b"")[: _MAX_LOGGED_BODY - len(body)])
            return message

        try:
            await self._app(scope, receive_noted, send)
        finally:
            if access_logger.isEnabledFor(level):
                self._tell(level, scope, record, bytes(body))
            _request_id.reset(token)

    async def _pass_on(
        self, token: Token[str | None], scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            _request_id.reset(token)

    def _tell(self, level: int, scope: Scope, record: RequestRecord, body: bytes) -> None:
        seconds = time.monotonic() - record.arrival_s
        fields: dict[str, Any] = {
            "method": scope["method"],
            "path": path_of(scope),
            "status": record.status or 499,
            "duration_s": round(seconds, 6),
            "client": (scope.get("client") or ("",))[0],
        }
        if record.key_name is not None:
            fields["key"] = record.key_name
        if record.num_prompt_tokens:
            fields |= _token_fields(record)
        if body:
            fields["body"] = body.decode("utf-8", "replace")
        text = "%s %s %s %.3fs"
        values = (fields["method"], fields["path"], fields["status"], seconds)
        access_logger.log(level, text, *values, extra={_EXTRA: fields})


def _token_fields(record: RequestRecord) -> dict[str, Any]:
    first_s = record.time_to_first_token_s
    return {
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "time_to_first_token_s": None if first_s is None else round(first_s, 6),
        "finish_reasons": dict(record.finish_reasons),
    }


class RequestIdFilter(logging.Filter):
    """Puts the id of the request that is answered on every line. For a handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets everything through."""
        record.request_id = _request_id.get() or "-"
        return True


class JsonFormatter(logging.Formatter):
    """Each line one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without a line break."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = getattr(record, "request_id", "-")
        if request_id != "-":
            told["request_id"] = request_id
        told |= getattr(record, _EXTRA, {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)
