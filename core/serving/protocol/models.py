"""`/v1/models` and `/version`."""

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
