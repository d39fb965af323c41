"""`POST /v1/responses`, and what is asked of a response by its id."""

from __future__ import annotations

import asyncio
import time
import uuid

from fastapi import APIRouter, Request, Response

from quire.core.errors import RequestError
from quire.core.serving.answers.generation import Generation
from quire.core.serving.answers.response_answers import (
    ResponseWriter,
    conversation_after,
    new_response,
)
from quire.core.serving.answers.response_events import ResponseEvents
from quire.core.serving.answers.response_input import Message, items_of, messages_of
from quire.core.serving.answers.response_store import ResponseStore, StoredResponse, stop
from quire.core.serving.http.bodies import read_body
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.field_names import renamed
from quire.core.serving.http.sse import EventStream, StreamStyle
from quire.core.serving.operations.record import record_of
from quire.core.serving.protocol.chat import ChatRequest
from quire.core.serving.protocol.responses import (
    CHAT_NAMES,
    DeletedResponse,
    InputItemList,
    ResponsesRequest,
)
from quire.core.serving.routes.chat import ChatRun, begin_chat
from quire.core.serving.server_state import Names, Server, ServerState

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request, server: Server) -> Response:
    """Answers a turn, whole, streamed, or in the background."""
    body = await read_body(request, ResponsesRequest)
    server.check_model(body.model)
    body.check()
    store, owner = _store_of(request), _owner_of(request)
    writer, generation = await _begin(body, server, store, owner)
    if body.stream:
        style = StreamStyle(frame=bytes, failed=writer.fail, end=b"")
        stream, wait_s = writer.stream(generation), server.settings.keep_alive_s
        return EventStream(stream, owner=generation, style=style, keep_alive_s=wait_s)
    if body.background:
        writer.entry.task = asyncio.create_task(writer.run(generation, server.gate))
        store.put(writer.entry)
        # One that is cancelled before its first step would leave the generation behind.
        await asyncio.sleep(0)
        return _answer(writer.entry)
    async with generation:
        await run_while_connected(request.receive, writer.whole(generation))
    return _answer(writer.entry)


@router.get("/v1/responses/{response_id}")
async def get_response(response_id: str, request: Request) -> Response:
    """A response that was stored, in the state in which it is."""
    _refuse_parameters(request)
    return _answer(_store_of(request).get(response_id, _owner_of(request)))


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> Response:
    """Forgets a response; one that is on its way is ended first."""
    store = _store_of(request)
    await stop(store.get(response_id, _owner_of(request)))
    store.forget(response_id)
    body = DeletedResponse(id=response_id, object="response", deleted=True)
    return Response(body.to_json(), media_type="application/json")


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """Ends a response that is answered in the background; harmless for one that is finished."""
    entry = _store_of(request).get(response_id, _owner_of(request))
    if not entry.response.background:
        raise RequestError(
            "only a response with background=true can be cancelled; close the connection of others",
            param="response_id",
        )
    await stop(entry)
    return _answer(entry)


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(response_id: str, request: Request) -> Response:
    """The items that a response answered."""
    _refuse_parameters(request)
    entry = _store_of(request).get(response_id, _owner_of(request))
    data = [{**item, "id": item.get("id", f"item_{i}")} for i, item in enumerate(entry.items)]
    body = InputItemList(
        object="list",
        data=data,
        first_id=str(data[0]["id"]) if data else None,
        last_id=str(data[-1]["id"]) if data else None,
        has_more=False,
    )
    return Response(body.to_json(), media_type="application/json")


async def _begin(
    body: ResponsesRequest, server: ServerState, store: ResponseStore, owner: str | None
) -> tuple[ResponseWriter, Generation]:
    if body.background:
        store.check_room()
    earlier: list[Message] = []
    if body.previous_response_id is not None:
        earlier = _earlier(store.get(body.previous_response_id, owner))
    items = items_of(body.input)
    messages = [*earlier, *messages_of(items)]
    response_id = f"resp_{uuid.uuid4().hex}"
    said = [{"role": "system", "content": body.instructions}] if body.instructions else []
    run = await _begin_chat(body, server, [*said, *messages], response_id)
    response = new_response(
        body, response_id=response_id, model=server.model_name, created=int(time.time())
    )
    entry = StoredResponse(response=response, owner=owner, items=items, messages=messages)
    writer = ResponseWriter(
        chat=run.writer,
        events=ResponseEvents(response, tells_logprobs=body.tells_logprobs),
        entry=entry,
        store=store if body.is_stored else None,
    )
    return writer, run.generation


async def _begin_chat(
    body: ResponsesRequest, server: ServerState, messages: list[Message], response_id: str
) -> ChatRun:
    """The chat that answers. Raises: RequestError that names the field of this endpoint."""
    with renamed(CHAT_NAMES):
        chat = ChatRequest.model_validate(body.chat_fields(messages))
        return await begin_chat(chat, server, Names(answer_id=response_id, engine_id=response_id))


def _earlier(entry: StoredResponse) -> list[Message]:
    if entry.response.status not in {"completed", "incomplete"}:
        raise RequestError(
            f"response {entry.response.id} is {entry.response.status}; a conversation goes on "
            "after one that is completed",
            param="previous_response_id",
        )
    return conversation_after(entry)


def _store_of(request: Request) -> ResponseStore:
    store = request.app.state.responses
    assert isinstance(store, ResponseStore), store
    return store


def _owner_of(request: Request) -> str | None:
    record = record_of(request.scope)
    return None if record is None else record.key_name


def _refuse_parameters(request: Request) -> None:
    asked = sorted(request.query_params)
    if asked:
        raise RequestError(
            f"{asked[0][:40]} is not supported here; leave it out", param=asked[0][:40]
        )


def _answer(entry: StoredResponse) -> Response:
    return Response(entry.response.to_json(), media_type="application/json")
