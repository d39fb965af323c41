"""Vectors, labels and scores: `/v1/embeddings`, `/pooling`, `/classify`, `/score`, `/rerank`."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from quire.core.engine.pooling import POOLING_TASKS, PoolingParams, PoolingTask, check_task
from quire.core.serving.answers.pooling_run import PoolingRun, encoded, usage_of
from quire.core.serving.http.bodies import read_body
from quire.core.serving.http.disconnect import run_while_connected
from quire.core.serving.protocol.base import ResponseBody
from quire.core.serving.protocol.pooling import (
    ClassificationItem,
    ClassificationRequest,
    ClassificationResponse,
    EmbeddingItem,
    EmbeddingRequest,
    EmbeddingResponse,
    PoolingFields,
    PoolingItem,
    PoolingRequest,
    PoolingResponse,
    RerankedDocument,
    RerankItem,
    RerankRequest,
    RerankResponse,
    RerankUsage,
    ScoreItem,
    ScoreRequest,
    ScoreResponse,
    prompts_of,
)
from quire.core.serving.server_state import Names, Server, ServerState, make_names

router = APIRouter()


@router.post("/v1/embeddings")
async def create_embeddings(request: Request, server: Server) -> Response:
    """A vector for each text."""
    body = await read_body(request, EmbeddingRequest)
    run, _ = _begin(body, request, server, "embd")
    params = PoolingParams(
        task="embed",
        dimensions=body.dimensions,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    work = run.outputs(prompts_of(body.input), params)
    outputs = await run_while_connected(request.receive, work)
    items = [
        EmbeddingItem(
            object="embedding", index=index, embedding=encoded(output.data, body.encoding_format)
        )
        for index, output in enumerate(outputs)
    ]
    return _answer(
        EmbeddingResponse(
            object="list", data=items, model=server.model_name, usage=usage_of(outputs)
        )
    )


@router.post("/pooling")
async def pool(request: Request, server: Server) -> Response:
    """What the model's head makes of each text."""
    body = await read_body(request, PoolingRequest)
    run, names = _begin(body, request, server, "pool")
    params = PoolingParams(
        task=body.task or _first_task(server),
        dimensions=body.dimensions,
        use_activation=body.use_activation is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    work = run.outputs(prompts_of(body.input), params)
    outputs = await run_while_connected(request.receive, work)
    is_packed = body.encoding_format == "base64"
    items = [
        PoolingItem(
            object="pooling",
            index=index,
            data=encoded(output.data, "base64") if is_packed else output.data,
        )
        for index, output in enumerate(outputs)
    ]
    return _answer(
        PoolingResponse(
            id=names.answer_id,
            object="list",
            created=int(time.time()),
            model=server.model_name,
            data=items,
            usage=usage_of(outputs),
        )
    )


@router.post("/classify")
async def classify(request: Request, server: Server) -> Response:
    """A label for each text."""
    body = await read_body(request, ClassificationRequest)
    run, names = _begin(body, request, server, "classify")
    params = PoolingParams(
        task="classify",
        use_activation=body.use_activation is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    work = run.outputs(prompts_of(body.input), params)
    outputs = await run_while_connected(request.receive, work)
    labels = server.engine.facts.labels
    items = [_classified(index, output.data, labels) for index, output in enumerate(outputs)]
    return _answer(
        ClassificationResponse(
            id=names.answer_id,
            object="list",
            created=int(time.time()),
            model=server.model_name,
            data=items,
            usage=usage_of(outputs),
        )
    )


@router.post("/score")
@router.post("/v1/score")
async def score(request: Request, server: Server) -> Response:
    """How well two texts go together."""
    body = await read_body(request, ScoreRequest)
    run, names = _begin(body, request, server, "score")
    work = run.scores(
        body.pairs(),
        use_activation=body.use_activation is not False,
        truncate=body.truncate_prompt_tokens,
    )
    scores, usage = await run_while_connected(request.receive, work)
    items = [ScoreItem(index=i, object="score", score=s) for i, s in enumerate(scores)]
    return _answer(
        ScoreResponse(
            id=names.answer_id,
            object="list",
            created=int(time.time()),
            model=server.model_name,
            data=items,
            usage=usage,
        )
    )


@router.post("/rerank")
@router.post("/v1/rerank")
@router.post("/v2/rerank")
async def rerank(request: Request, server: Server) -> Response:
    """The documents that answer a query best, as Jina and Cohere ask for them."""
    body = await read_body(request, RerankRequest)
    run, names = _begin(body, request, server, "rerank")
    texts = body.texts()
    work = run.scores(
        [(body.query, text) for text in texts],
        use_activation=True,
        truncate=body.truncate_prompt_tokens,
    )
    scores, usage = await run_while_connected(request.receive, work)
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[: body.top_n or len(texts)]
    tells = body.return_documents
    if tells is None:
        tells = not request.url.path.endswith("/v2/rerank")
    results = [RerankItem(index=index, relevance_score=scores[index]) for index in order]
    if tells:
        for item in results:
            item.document = RerankedDocument(text=texts[item.index])
    return _answer(
        RerankResponse(
            id=names.answer_id,
            model=server.model_name,
            results=results,
            usage=RerankUsage(total_tokens=usage.total_tokens),
        )
    )


def _begin(
    body: PoolingFields, request: Request, server: ServerState, prefix: str
) -> tuple[PoolingRun, Names]:
    server.check_model(body.model)
    names = make_names(request, prefix, None)
    run = PoolingRun(
        server=server,
        engine_id=names.engine_id,
        add_special_tokens=body.add_special_tokens is not False,
    )
    return run, names


def _first_task(server: ServerState) -> PoolingTask:
    """What `/pooling` means without a task. Raises: RequestError for a model that does not pool."""
    facts = server.engine.facts
    for task in POOLING_TASKS:
        if task in facts.tasks:
            return task
    check_task("embed", facts.tasks, facts.served_model_name)
    raise AssertionError(facts.tasks)


def _classified(
    index: int, data: list[float] | list[list[float]], labels: list[str]
) -> ClassificationItem:
    numbers = [float(number) for number in data]  # type: ignore[arg-type]
    best = max(range(len(numbers)), key=numbers.__getitem__)
    label = labels[best] if best < len(labels) else f"LABEL_{best}"
    return ClassificationItem(index=index, label=label, probs=numbers, num_classes=len(numbers))


def _answer(body: ResponseBody) -> Response:
    return Response(body.to_json(), media_type="application/json")
