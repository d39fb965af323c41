"""`GET /v1/models`, `GET /v1/models/{name}` and `GET /version`."""

from __future__ import annotations

from fastapi import APIRouter, Response

import quire
from quire.core.serving.protocol.models import ModelCard, ModelList, VersionResponse
from quire.core.serving.server_state import Server, ServerState

router = APIRouter()


@router.get("/v1/models")
async def list_models(server: Server) -> Response:
    """The models of this server."""
    body = ModelList(object="list", data=[_card(server)])
    return Response(body.to_json(), media_type="application/json")


@router.get("/v1/models/{name:path}")
async def get_model(name: str, server: Server) -> Response:
    """One model."""
    server.check_model(name)
    return Response(_card(server).to_json(), media_type="application/json")


@router.get("/version")
async def get_version() -> Response:
    """The version of the engine."""
    body = VersionResponse(version=quire.__version__)
    return Response(body.to_json(), media_type="application/json")


def _card(server: ServerState) -> ModelCard:
    facts = server.engine.facts
    return ModelCard(
        id=server.model_name,
        object="model",
        created=server.created,
        owned_by="quire",
        root=facts.model,
        max_model_len=facts.max_model_len,
    )
