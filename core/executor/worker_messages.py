"""What an executor and the process of its worker say to each other.

The executor leads: a `Submit` is not answered, every other message is, by one. So steps that are
asynchronous overlap as they do in one process: the worker waits for a step only when the executor
does, and can take in the next one until then.
"""

from __future__ import annotations

import msgspec

from quire.core.executor.error_records import ErrorRecord
from quire.core.interface.worker import StepBatch, StepResult

# ------------------------------------------------------------------------- executor to worker


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """Start this step."""

    batch: StepBatch


class Collect(msgspec.Struct, tag="collect", frozen=True):
    """Wait for the oldest step that was not collected."""


class Call(msgspec.Struct, tag="call", frozen=True):
    """Do what `name` says."""

    name: str
    """A key of `quire.core.executor.worker_child.CALLS`."""
    argument: bytes = b""


ToWorker = Submit | Collect | Call

# ------------------------------------------------------------------------- worker to executor


class Stepped(msgspec.Struct, tag="stepped", frozen=True):
    """What the collected step brought."""

    result: StepResult


class Value(msgspec.Struct, tag="value", frozen=True):
    """The result of a call."""

    value: bytes
    """In msgpack."""


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """What a call or a step met."""

    error: ErrorRecord


FromWorker = Stepped | Value | Failed
