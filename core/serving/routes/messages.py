"""`POST /v1/messages` and `/v1/messages/count_tokens`, as the Anthropic API has them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from quire.core.errors import QuireError
from quire.core.serving.answers.message_answers import (
    MESSAGES_STYLE,
    MessageWriter,
    error_body,
    new_answer,
)
from quire.core.serving.http.bodies import read_body
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.error_responses import failure_of
from quire.core.serving.http.field_names import renamed
from quire.core.serving.http.sse import EventStream
from quire.core.serving.protocol.chat import ChatRequest
from quire.core.serving.protocol.messages import (
    CHAT_NAMES,
    MessagesFields,
    MessagesRequest,
    TokenCount,
)
from quire.core.serving.routes.chat import begin_chat, render
from quire.core.serving.server_state import Server, ServerState, make_names

router = APIRouter()


@router.post("/v1/messages")
async def create_message(request: Request, server: Server) -> Response:
    """Answers a conversation, whole or streamed."""
    return await _with_own_errors(_create, request, server)


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, server: Server) -> Response:
    """How many tokens a conversation has."""
    return await _with_own_errors(_count, request, server)


async def _create(request: Request, server: ServerState) -> Response:
    body = await read_body(request, MessagesRequest)
    server.check_model(body.model)
    names = make_names(request, "msg", None)
    with renamed(CHAT_NAMES):
        run = await begin_chat(_chat_of(body), server, names)
    writer = MessageWriter(chat=run.writer, answer=new_answer(names.answer_id, server.model_name))
    if body.stream:
        stream = writer.stream(run.generation)
        wait_s = server.settings.keep_alive_s
        return EventStream(stream, owner=run.generation, style=MESSAGES_STYLE, keep_alive_s=wait_s)
    async with run.generation:
        answer = await run_while_connected(request.receive, writer.whole(run.generation))
    return Response(answer.to_json(), media_type="application/json")


async def _count(request: Request, server: ServerState) -> Response:
    body = await read_body(request, MessagesFields)
    server.check_model(body.model)
    text = await render(_chat_of(body), server)
    tokens = await server.engine.encode(text, add_special_tokens=False)
    return Response(TokenCount(input_tokens=len(tokens)).to_json(), media_type="application/json")


def _chat_of(body: MessagesFields) -> ChatRequest:
    """Raises: RequestError that names the field of this endpoint."""
    with renamed(CHAT_NAMES):
        return ChatRequest.model_validate(body.chat_fields())


async def _with_own_errors(
    handler: Callable[[Request, ServerState], Awaitable[Response]],
    request: Request,
    server: ServerState,
) -> Response:
    """The handler's answer, or its failure in the form of this API."""
    try:
        return await handler(request, server)
    except ClientDisconnect:
        raise
    except (QuireError, ValidationError) as error:
        failure = failure_of(error, retry_after_s=server.settings.retry_after_s)
        return Response(
            error_body(failure, request.state.request_id).to_json(),
            status_code=failure.status,
            media_type="application/json",
            headers=dict(failure.headers),
        )
