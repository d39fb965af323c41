"""`POST /generate`, `/generate_stream` and `/`, and `GET /info`, as text-generation-inference."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

import quire
from quire.core.engine.async_engine import OutputKind
from quire.core.errors import QuireError
from quire.core.serving.answers.generation import Generation
from quire.core.serving.answers.tgi_answers import TGI_STYLE, TgiWriter, error_body
from quire.core.serving.http.bodies import read_body
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.error_responses import failure_of
from quire.core.serving.http.field_names import renamed
from quire.core.serving.http.limits import check_limits
from quire.core.serving.http.sse import EventStream
from quire.core.serving.protocol.sampling import MAX_STOPS
from quire.core.serving.protocol.tgi import GenerateRequest, TgiInfo
from quire.core.serving.server_state import Server, ServerState, make_names

router = APIRouter()

_NAMES = {
    "max_tokens": "max_new_tokens",
    "prompt": "inputs",
    "structured_outputs": "grammar",
    "truncate_prompt_tokens": "truncate",
    "logprobs": "top_n_tokens",
}
"""The engine's names of fields to those of this API, for errors."""

Handler = Callable[[Request, ServerState], Awaitable[Response]]


@router.post("/generate")
async def generate(request: Request, server: Server) -> Response:
    """Continues a text."""
    return await _with_own_errors(_generate, request, server)


@router.post("/generate_stream")
async def generate_stream(request: Request, server: Server) -> Response:
    """Continues a text, token by token."""
    return await _with_own_errors(_generate_stream, request, server)


@router.post("/")
async def generate_either(request: Request, server: Server) -> Response:
    """What `stream` of the body says; whole answers stand in a list."""
    return await _with_own_errors(_generate_either, request, server)


@router.get("/info")
async def get_info(server: Server) -> Response:
    """The model and its limits."""
    facts, config = server.engine.facts, server.engine.config
    body = TgiInfo(
        model_id=server.model_name,
        model_dtype=f"torch.{facts.dtype}",
        model_device_type=facts.device,
        max_concurrent_requests=config.max_num_queued,
        max_best_of=1,
        max_stop_sequences=MAX_STOPS,
        max_input_tokens=facts.max_model_len - 1,
        max_total_tokens=facts.max_model_len,
        validation_workers=1,
        router="quire",
        version=quire.__version__,
    )
    return Response(body.to_json(), media_type="application/json")


async def _generate(request: Request, server: ServerState) -> Response:
    body = await read_body(request, GenerateRequest)
    body.check_stream(is_expected=False)
    return Response(await _whole(body, request, server), media_type="application/json")


async def _generate_stream(request: Request, server: ServerState) -> Response:
    body = await read_body(request, GenerateRequest)
    body.check_stream(is_expected=True)
    return await _streamed(body, request, server)


async def _generate_either(request: Request, server: ServerState) -> Response:
    body = await read_body(request, GenerateRequest)
    if body.stream:
        return await _streamed(body, request, server)
    answer = await _whole(body, request, server)
    return Response(b"[" + answer + b"]", media_type="application/json")


async def _whole(body: GenerateRequest, request: Request, server: ServerState) -> bytes:
    generation = await _begin(body, request, server, "final")
    writer = _writer(body, server)
    async with generation:
        answer = await run_while_connected(request.receive, writer.whole(generation))
    return answer.to_json()


async def _streamed(body: GenerateRequest, request: Request, server: ServerState) -> Response:
    generation = await _begin(body, request, server, "delta")
    chunks = _writer(body, server).chunks(generation)
    wait_s = server.settings.keep_alive_s
    return EventStream(chunks, owner=generation, style=TGI_STYLE, keep_alive_s=wait_s)


async def _begin(
    body: GenerateRequest, request: Request, server: ServerState, output_kind: OutputKind
) -> Generation:
    with renamed(_NAMES):
        params = body.settings.to_sampling_params(server.engine.default_sampling)
        check_limits(params, 1, settings=server.settings, config=server.engine.config)
        return await Generation.begin(
            server.engine,
            server.metrics,
            [body.inputs],
            params,
            request_id=make_names(request, "tgi", None).engine_id,
            output_kind=output_kind,
            add_special_tokens=True,
        )


def _writer(body: GenerateRequest, server: ServerState) -> TgiWriter:
    ids = getattr(server.engine.tokenizer, "all_special_ids", ())
    return TgiWriter(request=body, special_ids=frozenset(ids))


async def _with_own_errors(handler: Handler, request: Request, server: ServerState) -> Response:
    """The handler's answer, or its failure in the form of this API."""
    try:
        return await handler(request, server)
    except ClientDisconnect:
        raise
    except (QuireError, ValidationError) as error:
        failure = failure_of(error, retry_after_s=server.settings.retry_after_s)
        return Response(
            error_body(failure).to_json(),
            status_code=422 if failure.status == 400 else failure.status,
            media_type="application/json",
            headers=dict(failure.headers),
        )
