"""Every failure as a status and a body of the OpenAI API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from quire.core.engine.async_engine import QueueFullError
from quire.core.errors import (
    CheckpointError,
    EngineDeadError,
    QuireError,
    RequestError,
    UnsupportedError,
)
from quire.core.serving.protocol.errors import ErrorBody, ErrorDetail

logger = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"
_MAX_MESSAGE_CHARS = 2000
"""A client that sends megabytes does not get them back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a client is told."""

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The JSON that says so."""
        detail = ErrorDetail(
            message=_printable(self.message),
            type=self.type,
            param=None if self.param is None else _printable(self.param),
            code=self.code,
        )
        return ErrorBody(error=detail).to_json()

    def response(self) -> Response:
        """The HTTP response that says so."""
        return Response(
            self.body(),
            status_code=self.status,
            media_type="application/json",
            headers=dict(self.headers),
        )


class HttpError(QuireError):
    """A refusal that belongs to HTTP and not to the engine."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


def failure_of(error: BaseException, *, retry_after_s: int = 1) -> Failure:
    """What a client is told about `error`. What nobody foresaw is logged and told as 500."""
    if isinstance(error, HttpError):
        return error.failure
    if isinstance(error, QueueFullError):
        return Failure(
            status=429,
            message=str(error),
            type="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": str(retry_after_s)},
        )
    if isinstance(error, RequestError):
        return Failure(status=400, message=str(error), param=error.param)
    if isinstance(error, CheckpointError):
        # The model is loaded: this is a request for text where there is no tokenizer.
        return Failure(status=400, message=str(error), code="unsupported")
    if isinstance(error, UnsupportedError):
        return Failure(status=400, message=str(error), code="unsupported")
    if isinstance(error, ValidationError | RequestValidationError):
        return _of_validation(error)
    if isinstance(error, HTTPException):
        return _of_http(error)
    return _of_server(error)


def install_error_handlers(app: FastAPI, *, retry_after_s: int) -> None:
    """Makes every error of `app`, the framework's own included, a body of the OpenAI API."""

    async def handle(_: Request, error: Exception) -> Response:
        return failure_of(error, retry_after_s=retry_after_s).response()

    async def handle_gone(_: Request, __: Exception) -> Response:
        # Nobody reads it; the number is what proxies log for a client that left.
        return Response(status_code=499)

    app.add_exception_handler(ClientDisconnect, handle_gone)
    kinds = (QuireError, RequestValidationError, ValidationError, HTTPException, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, handle)


def _of_validation(error: ValidationError | RequestValidationError) -> Failure:
    """All that is wrong with a body, in one message."""
    problems = error.errors()
    texts = []
    for problem in problems[:8]:
        where = ".".join(str(part) for part in problem["loc"])
        texts.append(_sentence(where, problem["type"], problem["msg"]))
    first = problems[0]["loc"] if problems else ()
    return Failure(
        status=400,
        message="; ".join(dict.fromkeys(texts)),
        param=str(first[0]) if first else None,
        code="invalid_json" if problems and problems[0]["type"] == "json_invalid" else None,
    )


def _sentence(where: str, kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return f"{where} is not a field that this server knows; leave it out"
    if kind == "missing":
        return f"{where} is missing"
    return f"{where}: {message}" if where else message


def _of_http(error: HTTPException) -> Failure:
    status = 400 if error.status_code == 422 else error.status_code
    return Failure(
        status=status,
        message=str(error.detail),
        type="not_found_error" if status == 404 else INVALID if status < 500 else SERVER,
        code={404: "not_found", 405: "method_not_allowed"}.get(status),
        headers=dict(error.headers or {}),
    )


def _of_server(error: BaseException) -> Failure:
    if isinstance(error, EngineDeadError):
        logger.error("a request met a dead engine: %s", error)
        return Failure(status=503, message=str(error), type=SERVER, code="engine_dead")
    if isinstance(error, QuireError):
        logger.error("a request failed: %s", error)
        return Failure(status=500, message=str(error), type=SERVER)
    logger.error("a request failed in a way that is not foreseen", exc_info=error)
    message = (
        f"the server met an error of its own ({type(error).__name__}); its log has the details"
    )
    return Failure(status=500, message=message, type=SERVER, code="internal_error")


def _printable(text: str) -> str:
    """Text that is UTF-8 for sure, and not longer than what is useful."""
    safe = text.encode("utf-8", "replace").decode()
    if len(safe) <= _MAX_MESSAGE_CHARS:
        return safe
    return f"{safe[:_MAX_MESSAGE_CHARS]}... ({len(safe)} characters)"
