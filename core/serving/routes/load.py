"""`GET /live` and `GET /load`: for load balancers."""

from __future__ import annotations

from fastapi import APIRouter, Response

from quire.core.engine.facts import EngineStatistics
from quire.core.errors import EngineDeadError
from quire.core.serving.protocol.models import LoadResponse
from quire.core.serving.server_state import Server

router = APIRouter()


@router.head("/live", include_in_schema=False)
@router.get("/live")
async def get_live() -> Response:
    """200 while the process answers at all, whatever its engine does."""
    return Response(status_code=200)


@router.get("/load")
async def get_load(server: Server) -> Response:
    """How much there is to do."""
    try:
        statistics = await server.engine.statistics()
    except EngineDeadError:
        statistics = EngineStatistics()
    body = LoadResponse(
        server_load=server.gate.num_inside,
        running=statistics.num_running,
        waiting=statistics.num_waiting,
        cache_usage=statistics.cache_usage,
    )
    return Response(body.to_json(), media_type="application/json")
