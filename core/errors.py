"""Quire's exceptions; the tree is drawn in `quire.core.interface.errors`."""

from __future__ import annotations

from quire.core.interface.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    EngineDeadError,
    PluginError,
    QuireError,
    Reason,
    RequestError,
    UnsupportedError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "DeviceLost",
    "DeviceOutOfMemory",
    "EngineDeadError",
    "PluginError",
    "QuireError",
    "Reason",
    "RequestError",
    "UnsupportedError",
]
