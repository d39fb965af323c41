"""What the engine core and its front say to each other when they live in two processes."""

from __future__ import annotations

from typing import Any

import msgspec

from quire.core.config import EngineConfig
from quire.core.engine.facts import EngineFacts
from quire.core.errors import EngineDeadError
from quire.core.executor.error_records import ErrorRecord
from quire.core.scheduler.request import RequestSpec, RequestUpdate

# ------------------------------------------------------------------------------ front to core


class AddRequests(msgspec.Struct, tag="add", frozen=True):
    """Take these in."""

    specs: list[RequestSpec]


class AbortRequests(msgspec.Struct, tag="abort", frozen=True):
    """End these; no update of theirs is awaited."""

    request_ids: list[str]


class Call(msgspec.Struct, tag="call", frozen=True):
    """Do what `name` says, between two steps, and answer."""

    call_id: int
    name: str
    """A key of `quire.core.engine.process.CALLS`."""


class CheckHealth(msgspec.Struct, tag="check", frozen=True):
    """See whether steps can still run; said inside the core's process when a worker is gone."""


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Release everything and exit."""


ToCore = AddRequests | AbortRequests | Call | CheckHealth | Shutdown

# ------------------------------------------------------------------------------ core to front


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The core can serve."""

    config: EngineConfig
    """Resolved."""
    facts: EngineFacts


class Updates(msgspec.Struct, tag="updates", frozen=True):
    """What one step brought."""

    updates: list[RequestUpdate]


class Answer(msgspec.Struct, tag="answer", frozen=True):
    """The result of a call, or why it failed."""

    call_id: int
    value: Any = None
    error: ErrorRecord | None = None


class Fatal(msgspec.Struct, tag="fatal", frozen=True):
    """The core's last words: it could not start, or it has died."""

    error: ErrorRecord


class Exited(msgspec.Struct, tag="exited", frozen=True):
    """The core's process is gone; said by the front's own watcher."""

    exit_code: int


FromCore = Ready | Updates | Answer | Fatal | Exited


def same_death(error: EngineDeadError) -> EngineDeadError:
    """The same error for the next who asks: one object raised often keeps all tracebacks."""
    copy = EngineDeadError(*error.args)
    copy.root_cause = error.root_cause
    copy.__cause__ = error.__cause__
    for note in getattr(error, "__notes__", ()):
        copy.add_note(note)
    return copy
