"""The environment variables that Quire reads; no other module reads any."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What the environment says, read once at the edge (CLI, server, LLM) and handed down."""

    device: str | None
    """QUIRE_DEVICE: the device where none was asked for."""
    log_level: str
    """QUIRE_LOG_LEVEL: debug, info, warning, error."""
    api_key: str | None
    """QUIRE_API_KEY: the key that clients of the server must send."""
    log_format: str
    """QUIRE_LOG_FORMAT: text, or json for machines."""
    cache_directory: Path
    """QUIRE_CACHE: where compiled and downloaded things may be kept."""


def read_environment() -> Environment:
    """The environment as it is now."""
    cache_root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Environment(
        device=os.environ.get("QUIRE_DEVICE") or None,
        log_level=os.environ.get("QUIRE_LOG_LEVEL", "warning").lower(),
        api_key=os.environ.get("QUIRE_API_KEY") or None,
        log_format=os.environ.get("QUIRE_LOG_FORMAT", "text").lower(),
        cache_directory=Path(os.environ.get("QUIRE_CACHE") or Path(cache_root) / "quire"),
    )


def read_settings(names: Sequence[str]) -> dict[str, str]:
    """What the environment says of these settings: QUIRE_MAX_NUM_SEQS for `max_num_seqs`.

    An empty variable says nothing.
    """
    found = {name: os.environ.get(f"QUIRE_{name.upper()}", "") for name in names}
    return {name: value for name, value in found.items() if value}


def make_child_environment(
    *, without: Sequence[str] = (), changes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """This process's environment for a child: without names of these prefixes, with `changes`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(tuple(without))}
    return {**kept, **(changes or {})}
