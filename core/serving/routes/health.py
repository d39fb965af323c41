"""`GET /health`, `GET /ready` and `GET /metrics`: for whoever watches the server."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from quire.core.serving.http.error_responses import SERVER, Failure
from quire.core.serving.server_state import Server

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def get_health(server: Server) -> Response:
    """200 while process and engine live or the engine is restarted; 503: restart the process."""
    if not server.engine.errored or server.is_restarting:
        return Response(status_code=200)
    cause = server.engine.dead_error
    message = str(cause) if cause is not None else "the engine is dead"
    return Failure(status=503, message=message, type=SERVER, code="engine_dead").response()


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def get_ready(server: Server) -> Response:
    """200 while new requests are taken; 503 once the server shuts down or its engine is dead."""
    if server.gate.is_open and server.engine.is_ready:
        return Response(status_code=200)
    message = "new requests are not taken"
    return Failure(status=503, message=message, type=SERVER, code="not_ready").response()


@router.get("/metrics")
async def get_metrics(server: Server) -> Response:
    """All numbers in Prometheus' text format."""
    return Response(await server.metrics.expose(), media_type=CONTENT_TYPE_LATEST)
