"""`GET /v1/server`: the plan, the device and the numbers of this moment."""

from __future__ import annotations

import time

import msgspec
from fastapi import APIRouter, Response

import quire
from quire.core.engine.facts import EngineStatistics
from quire.core.errors import EngineDeadError
from quire.core.serving.protocol.server import ServerDevice, ServerFacts, ServerModel
from quire.core.serving.server_state import Server, ServerState

router = APIRouter()

_TOLD_SETTINGS = (
    *("max_num_seqs", "max_num_batched_tokens", "max_num_queued", "max_model_len", "block_size"),
    *("cache_dtype", "scheduling_policy", "enable_prefix_caching", "enable_chunked_prefill"),
    *("overlap_scheduling", "quantization", "seed", "worker_process"),
)


@router.get("/v1/server")
async def get_server(server: Server) -> Response:
    """Model, device, plan, settings, and the engine's numbers now."""
    try:
        statistics = await server.engine.statistics()
    except EngineDeadError:
        statistics = EngineStatistics()
    facts = server.engine.facts
    body = ServerFacts(
        version=quire.__version__,
        uptime_s=round(time.time() - server.created, 1),
        state=server.state_name,
        num_restarts=server.num_restarts,
        model=_model(server),
        device=ServerDevice(
            backend=facts.device,
            name=facts.device_name,
            num_cache_tokens=facts.num_cache_tokens,
            providers=dict(facts.providers),
            memory_bytes=dict(statistics.memory_bytes),
        ),
        changes=list(facts.changes),
        startup_s=dict(facts.startup_s),
        settings={name: getattr(server.engine.config, name, None) for name in _TOLD_SETTINGS},
        statistics=msgspec.to_builtins(statistics),
    )
    return Response(body.to_json(), media_type="application/json")


def _model(server: ServerState) -> ServerModel:
    facts = server.engine.facts
    return ServerModel(
        name=server.model_name,
        source=facts.model,
        architecture=facts.architecture,
        num_parameters=facts.num_parameters,
        weight_bytes=facts.weight_bytes,
        dtype=facts.dtype,
        max_model_len=facts.max_model_len,
        vocab_size=facts.vocab_size,
        has_chat_template=_has_chat_template(server),
    )


def _has_chat_template(server: ServerState) -> bool:
    own = server.engine.config.chat_template
    return bool(own or getattr(server.engine.tokenizer, "chat_template", None))
