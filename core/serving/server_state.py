"""What the routes share: the engine, the settings, the metrics and the gate."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Annotated

from fastapi import Depends, Request

from quire.core.engine.async_engine import AsyncEngine
from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.http.gate import Gate
from quire.core.serving.metrics import ServerMetrics
from quire.core.serving.operations.record import record_of
from quire.core.serving.settings import ServerSettings
from quire.core.serving.tools.registry import Formats


@dataclass(slots=True, kw_only=True)
class ServerState:
    """One server; made with the app and held by it. The supervisor alone changes it."""

    engine: AsyncEngine
    """Another one after a restart."""
    settings: ServerSettings
    metrics: ServerMetrics
    gate: Gate
    formats: Formats = field(default_factory=Formats)
    """How the model writes calls and thoughts."""
    created: int = field(default_factory=lambda: int(time.time()))
    """When the server began, in seconds since the epoch."""
    is_restarting: bool = False
    """The engine died, and another one is being started."""
    num_restarts: int = 0

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.engine.facts.served_model_name

    @property
    def state_name(self) -> str:
        """`ready`, `restarting`, `draining` or `dead`."""
        if self.is_restarting:
            return "restarting"
        if self.engine.errored:
            return "dead"
        return "ready" if self.gate.is_open else "draining"

    def replace_engine(self, engine: AsyncEngine) -> None:
        """Another engine answers from now on."""
        self.engine = engine
        self.num_restarts += 1
        self.metrics.follow(engine)

    def check_model(self, asked: str | None) -> None:
        """A request without a model means the only one there is. Raises: HttpError (404)."""
        if asked is None or asked == self.model_name:
            return
        raise HttpError(
            Failure(
                status=404,
                message=f"the model {asked!r} is not here; this server has {self.model_name!r}",
                type="not_found_error",
                param="model",
                code="model_not_found",
            )
        )


@dataclass(frozen=True, slots=True)
class Names:
    """The names of one HTTP request."""

    answer_id: str
    """In the body of the answer."""
    engine_id: str
    """In the engine: unique even where a client repeats its ids."""


def make_names(request: Request, prefix: str, own_id: str | None) -> Names:
    """Names after the client's own id (of the body, else of the header), or after a new one."""
    answer_id = f"{prefix}-{own_id or request.state.request_id}"
    return Names(answer_id=answer_id, engine_id=f"{answer_id}-{uuid.uuid4().hex[:8]}")


async def server_of(request: Request) -> ServerState:
    """The server that this request came to, with metrics that also fill the request's record.

    A coroutine, though it waits for nothing: FastAPI sends plain functions through a thread.
    """
    state = request.app.state.server
    assert isinstance(state, ServerState), state
    record = record_of(request.scope)
    return state if record is None else replace(state, metrics=state.metrics.recording(record))


Server = Annotated[ServerState, Depends(server_of)]
"""How a route asks for the server."""
