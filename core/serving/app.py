"""Puts the server together: `make_app(engine, settings)`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import quire
from quire.core.engine.async_engine import AsyncEngine
from quire.core.serving.error_responses import install_error_handlers
from quire.core.serving.gate import Gate
from quire.core.serving.metrics import ServerMetrics
from quire.core.serving.middleware import (
    BodyLimitMiddleware,
    GateMiddleware,
    RequestIdMiddleware,
)
from quire.core.serving.operations.access import AccessMiddleware
from quire.core.serving.operations.api_keys import KeyRing, plain_key
from quire.core.serving.operations.deadline import DeadlineMiddleware
from quire.core.serving.operations.key_limits import KeyLimits
from quire.core.serving.operations.request_log import RequestLogMiddleware
from quire.core.serving.operations.tracing import install_tracing
from quire.core.serving.protocol.chat import ChatRequest, ChatResponse
from quire.core.serving.protocol.completions import CompletionRequest, CompletionResponse
from quire.core.serving.protocol.tokens import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeResponse,
    TokenizeTextRequest,
)
from quire.core.serving.routes import (
    chat,
    completions,
    health,
    models,
    playground,
    server,
    tokens,
)
from quire.core.serving.server_state import ServerState
from quire.core.serving.settings import ServerSettings

_BODIES: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {
    "/v1/completions": (CompletionRequest, CompletionResponse),
    "/v1/chat/completions": (ChatRequest, ChatResponse),
    "/tokenize": (TokenizeTextRequest, TokenizeResponse),
    "/detokenize": (DetokenizeRequest, DetokenizeResponse),
}
"""Path to what it takes and gives, for the API's own documentation."""


def make_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """The HTTP application around a running engine, of which it owns and starts nothing."""
    app = FastAPI(
        title="Quire",
        version=quire.__version__,
        redirect_slashes=False,
        root_path=settings.root_path.rstrip("/"),
    )
    state = ServerState(
        engine=engine, settings=settings, metrics=ServerMetrics(engine), gate=Gate()
    )
    app.state.server = state
    for routes in (completions, chat, tokens, models, health, server):
        app.include_router(routes.router)
    if settings.serve_playground:
        app.include_router(playground.router)
    install_error_handlers(app, retry_after_s=settings.retry_after_s)
    _add_middleware(app, state)
    app.openapi = lambda: _schema(app)  # type: ignore[method-assign]
    return app


def _add_middleware(app: FastAPI, state: ServerState) -> None:
    """Innermost first: the last one added is the first that a request passes."""
    settings = state.settings
    app.add_middleware(GateMiddleware, gate=state.gate)
    app.add_middleware(BodyLimitMiddleware, max_bytes=settings.max_body_bytes)
    app.add_middleware(DeadlineMiddleware, limit_s=settings.request_timeout_s)
    plain = [plain_key(secret, index) for index, secret in enumerate(settings.api_keys)]
    if keys := [*plain, *settings.keys]:
        ring, protects = KeyRing(keys), settings.protect_metrics
        app.add_middleware(
            AccessMiddleware, ring=ring, limits=KeyLimits(), protects_metrics=protects
        )
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    install_tracing(app, settings.otlp_traces_endpoint)
    if settings.log_requests or settings.log_prompts:
        app.add_middleware(RequestLogMiddleware, logs_prompts=settings.log_prompts)
    app.add_middleware(RequestIdMiddleware)


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, with the bodies that the routes read by themselves."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        pairs = [(b, "validation") for bodies in _BODIES.values() for b in bodies]
        refs, definitions = models_json_schema(pairs, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
        schema.setdefault("components", {})["schemas"] = definitions.get("$defs", {})
        for path, (asked, given) in _BODIES.items():
            post = schema["paths"][path]["post"]
            post["requestBody"] = _content(refs[(asked, "validation")])
            post["responses"]["200"] |= _content(refs[(given, "validation")])
        app.openapi_schema = schema
    return app.openapi_schema


def _content(ref: Any) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": ref}}}
