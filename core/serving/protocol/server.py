"""`/v1/server`: what serves, for the playground, `quire top` and whoever is curious."""

from __future__ import annotations

from typing import Any

from quire.core.serving.protocol.base import ResponseBody


class ServerModel(ResponseBody):
    """What was loaded."""

    name: str
    source: str
    """As the operator named it."""
    architecture: str
    num_parameters: int
    weight_bytes: int
    dtype: str
    max_model_len: int
    vocab_size: int
    has_chat_template: bool


class ServerDevice(ResponseBody):
    """Where it runs."""

    backend: str
    name: str
    num_cache_tokens: int
    providers: dict[str, str]
    """Operator to who serves it: the plan."""
    memory_bytes: dict[str, int]


class ServerFacts(ResponseBody):
    """Everything that does not change while the engine lives, and the numbers of this moment."""

    version: str
    uptime_s: float
    state: str
    """`ready`, `restarting`, `draining` or `dead`."""
    num_restarts: int
    model: ServerModel
    device: ServerDevice
    changes: list[str]
    """What was filled in or corrected of the configuration, and why."""
    startup_s: dict[str, float]
    settings: dict[str, Any]
    """Of the engine; nothing secret is among them."""
    statistics: dict[str, Any]
