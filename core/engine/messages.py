"""What the engine core and its front say to each other when they live in two processes."""

from __future__ import annotations

import traceback
from typing import Any

import msgspec

from quire.core.config import EngineConfig
from quire.core.engine.facts import EngineFacts
from quire.core.errors import (
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


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Release everything and exit."""


ToCore = AddRequests | AbortRequests | Call | Shutdown

# ------------------------------------------------------------------------------ core to front


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An exception as plain data."""

    kind: str
    """The class's name."""
    message: str
    traceback: str
    reasons: list[Reason] = []


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

_KINDS: dict[str, type[QuireError]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        ConfigError,
        DeviceError,
        DeviceLost,
        DeviceOutOfMemory,
        EngineDeadError,
        PluginError,
        RequestError,
    )
}


def record_error(error: BaseException) -> ErrorRecord:
    """The exception as plain data; of an EngineDeadError that has one, its cause."""
    if isinstance(error, EngineDeadError) and error.__cause__ is not None:
        error = error.__cause__
    return ErrorRecord(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        reasons=list(error.reasons) if isinstance(error, UnsupportedError) else [],
    )


def restore_error(record: ErrorRecord) -> QuireError:
    """One of Quire's own errors as it was raised.

    Anything else as an EngineDeadError with the root cause.
    """
    if record.kind == UnsupportedError.__name__:
        what = record.message.partition(" is not supported:")[0]
        error: QuireError = UnsupportedError(record.reasons, what=what)
    elif record.kind == PluginError.__name__:
        error = PluginError(record.message, details=record.traceback)
    elif record.kind in _KINDS:
        error = _KINDS[record.kind](record.message)
    else:
        return dead_by(record)
    error.add_note(f"In the process of the engine core:\n{record.traceback}")
    return error


def dead_by(record: ErrorRecord) -> EngineDeadError:
    """What everybody who waits is told when the core has died of `record`."""
    error = EngineDeadError(
        "the engine core has died; restart the engine",
        root_cause=f"{record.kind}: {record.message}",
    )
    error.add_note(f"In the process of the engine core:\n{record.traceback}")
    return error


def same_death(error: EngineDeadError) -> EngineDeadError:
    """The same error for the next who asks: one object raised often keeps all tracebacks."""
    copy = EngineDeadError(*error.args)
    copy.root_cause = error.root_cause
    copy.__cause__ = error.__cause__
    for note in getattr(error, "__notes__", ()):
        copy.add_note(note)
    return copy
