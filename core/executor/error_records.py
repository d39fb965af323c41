"""Exceptions as plain data, so that they keep their kind on the way to another process."""

from __future__ import annotations

import traceback

import msgspec

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

ENGINE_CORE = "the engine core"
WORKER = "the worker"


class ErrorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An exception as plain data."""

    kind: str
    """The class's name."""
    message: str
    traceback: str
    reasons: list[Reason] = []
    requested_bytes: int | None = None
    """What a device refused, where it said so."""
    tag: str = "unknown"
    """What refused memory was for."""
    param: str | None = None
    """The field of a request that is wrong."""


_KINDS: dict[str, type[QuireError]] = {
    kind.__name__: kind
    for kind in (
        CheckpointError,
        ConfigError,
        DeviceError,
        DeviceLost,
        EngineDeadError,
    )
}
"""Those that are their message alone."""


def record_error(error: BaseException) -> ErrorRecord:
    """The exception as plain data; of an EngineDeadError that has one, its cause."""
    if isinstance(error, EngineDeadError) and error.__cause__ is not None:
        error = error.__cause__
    return ErrorRecord(
        kind=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        reasons=list(error.reasons) if isinstance(error, UnsupportedError) else [],
        requested_bytes=error.requested_bytes if isinstance(error, DeviceOutOfMemory) else None,
        tag=error.tag if isinstance(error, DeviceOutOfMemory) else "unknown",
        param=error.param if isinstance(error, RequestError) else None,
    )


def restore_error(record: ErrorRecord, *, where: str = ENGINE_CORE) -> QuireError:
    """One of Quire's own errors as it was raised.

    Anything else as an EngineDeadError with the root cause. `where`: whose process it was.
    """
    if record.kind == UnsupportedError.__name__:
        what = record.message.partition(" is not supported:")[0]
        error: QuireError = UnsupportedError(record.reasons, what=what)
    elif record.kind == PluginError.__name__:
        error = PluginError(record.message, details=record.traceback)
    elif record.kind == DeviceOutOfMemory.__name__:
        size, tag = record.requested_bytes, record.tag
        error = DeviceOutOfMemory(record.message, requested_bytes=size, tag=tag)
    elif record.kind == RequestError.__name__:
        error = RequestError(record.message, param=record.param)
    elif record.kind in _KINDS:
        error = _KINDS[record.kind](record.message)
    else:
        return dead_by(record, where=where)
    error.add_note(f"In the process of {where}:\n{record.traceback}")
    return error


def dead_by(record: ErrorRecord, *, where: str = ENGINE_CORE) -> EngineDeadError:
    """What everybody who waits is told when the core has died of `record`."""
    error = EngineDeadError(
        "the engine core has died; restart the engine",
        root_cause=f"{record.kind}: {record.message}",
    )
    error.add_note(f"In the process of {where}:\n{record.traceback}")
    return error
