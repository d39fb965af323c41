"""All endpoints of the API, put into an application."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from quire.core.serving.answers.response_store import ResponseStore
from quire.core.serving.routes import (
    audio,
    chat,
    completions,
    health,
    load,
    messages,
    models,
    pooling,
    responses,
    server,
    tgi,
    tokens,
)

ROUTERS: tuple[APIRouter, ...] = tuple(
    module.router
    for module in (
        *(completions, chat, responses, messages, tgi, pooling, audio),
        *(tokens, models, health, load, server),
    )
)


def install_endpoints(app: FastAPI) -> None:
    """Adds every route of the API, and what its routes remember."""
    app.state.responses = ResponseStore()
    for router in ROUTERS:
        app.include_router(router)
