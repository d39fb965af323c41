"""`/v1/models`, `/version` and `/load`."""

from __future__ import annotations

from typing import Literal

from quire.core.serving.protocol.base import ResponseBody


class ModelCard(ResponseBody):
    """A model that this server has."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["quire"]
    root: str
    """What the engine loaded."""
    max_model_len: int


class ModelList(ResponseBody):
    """All models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


class VersionResponse(ResponseBody):
    """Of the engine."""

    version: str


class LoadResponse(ResponseBody):
    """How much there is to do."""

    server_load: int
    """HTTP requests that are being answered, by vLLM's name."""
    running: int
    """Requests whose tokens the engine computes."""
    waiting: int
    """Requests that wait for room."""
    cache_usage: float
    """Of the cache's blocks, the part in use, from 0 to 1."""
