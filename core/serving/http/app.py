"""Puts the server together: `make_app(engine, settings)`."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

import quire
from quire.core.engine.async_engine import AsyncEngine
from quire.core.serving.http.endpoints import install_endpoints
from quire.core.serving.http.error_responses import install_error_handlers
from quire.core.serving.http.gate import Gate
from quire.core.serving.http.middleware import (
    BodyLimitMiddleware,
    GateMiddleware,
    RequestIdMiddleware,
)
from quire.core.serving.http.openapi import make_document
from quire.core.serving.metrics import ServerMetrics
from quire.core.serving.operations.access import AccessMiddleware
from quire.core.serving.operations.api_keys import KeyRing, plain_key
from quire.core.serving.operations.deadline import DeadlineMiddleware
from quire.core.serving.operations.key_limits import KeyLimits
from quire.core.serving.operations.request_log import RequestLogMiddleware
from quire.core.serving.operations.tracing import install_tracing
from quire.core.serving.routes import playground
from quire.core.serving.server_state import ServerState
from quire.core.serving.settings import ServerSettings
from quire.core.serving.tools.detection import formats_of


def make_app(engine: AsyncEngine, settings: ServerSettings) -> FastAPI:
    """The HTTP application around a running engine, of which it owns and starts nothing."""
    app = FastAPI(
        title="Quire",
        version=quire.__version__,
        redirect_slashes=False,
    )
    state = ServerState(
        engine=engine,
        settings=settings,
        metrics=ServerMetrics(engine),
        gate=Gate(),
        formats=formats_of(engine, settings),
    )
    app.state.server = state
    install_endpoints(app)
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
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )
    install_tracing(app, settings.otlp_traces_endpoint)
    app.add_middleware(
        RequestLogMiddleware,
        logs_requests=settings.log_requests or settings.log_prompts,
        logs_prompts=settings.log_prompts,
    )
    app.add_middleware(RequestIdMiddleware, root_path=settings.root_path.rstrip("/"))


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        app.openapi_schema = make_document(app)
    return app.openapi_schema
