"""A failure that is told before a route is reached, in the form of the API that was asked."""

from __future__ import annotations

from fastapi import Response
from starlette.types import Scope

from quire.core.serving.answers import message_answers, tgi_answers
from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.http.sse import COMPLETIONS_STYLE, StreamStyle
from quire.core.serving.operations.record import path_of, record_of

_ANTHROPIC = "/v1/messages"
_TGI = frozenset({"/", "/generate", "/generate_stream"})


def response_to(scope: Scope, failure: Failure) -> Response:
    """The HTTP response that tells the client of `scope` about a failure."""
    path = path_of(scope)
    if _is_anthropic(path):
        record = record_of(scope)
        body = message_answers.error_body(failure, record.request_id if record else None).to_json()
    elif path in _TGI and scope["method"] == "POST":
        body = tgi_answers.error_body(failure).to_json()
    else:
        return failure.response()
    return Response(
        body,
        status_code=failure.status,
        media_type="application/json",
        headers=dict(failure.headers),
    )


def last_event_for(scope: Scope, failure: Failure) -> bytes:
    """What ends a stream that has begun, with the failure as its last event."""
    path = path_of(scope)
    style: StreamStyle = COMPLETIONS_STYLE
    if _is_anthropic(path):
        style = message_answers.MESSAGES_STYLE
    elif path in _TGI:
        style = tgi_answers.TGI_STYLE
    return style.failed(HttpError(failure)) + style.end


def _is_anthropic(path: str) -> bool:
    return path == _ANTHROPIC or path.startswith(_ANTHROPIC + "/")
