"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from fastapi import APIRouter, Request, Response

from quire.core.serving.answers.answers import AnswerHead
from quire.core.serving.answers.completion_answers import CompletionWriter
from quire.core.serving.answers.generation import Generation, Prompt
from quire.core.serving.http.bodies import read_body
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.http.limits import check_limits
from quire.core.serving.http.sse import EventStream
from quire.core.serving.protocol.completions import CompletionRequest
from quire.core.serving.server_state import Server, make_names

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request, server: Server) -> Response:
    """Continues one or more prompts."""
    body = await read_body(request, CompletionRequest)
    server.check_model(body.model)
    params = body.to_sampling_params(server.engine.default_sampling)
    prompts = prompts_of(body)
    check_limits(params, len(prompts), settings=server.settings, config=server.engine.config)
    names = make_names(request, "cmpl", body.request_id)
    generation = await Generation.begin(
        server.engine,
        server.metrics,
        prompts,
        params,
        request_id=names.engine_id,
        output_kind="delta" if body.is_streaming else "final",
        add_special_tokens=body.add_special_tokens is not False,
    )
    head = AnswerHead(id=names.answer_id, model=server.model_name)
    writer = CompletionWriter(request=body, head=head, engine=server.engine)
    if body.is_streaming:
        chunks, wait_s = writer.chunks(generation), server.settings.keep_alive_s
        return EventStream(chunks, owner=generation, keep_alive_s=wait_s)
    async with generation:
        answer = await run_while_connected(request.receive, writer.whole(generation))
    return Response(answer.to_json(), media_type="application/json")


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """The prompts of a request: a text, token ids, or several of either."""
    given = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [cast("Prompt", given)]
    return list(cast("Sequence[Prompt]", given))
