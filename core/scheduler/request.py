"""A request: as it arrives at the engine core, and its state while it lives there."""

from __future__ import annotations

import enum

import msgspec

from quire.core.interface.worker import SamplingSpec


class RequestSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A request as the front hands it over: validated, tokenized, plain data."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec
    max_tokens: int
    """The most output tokens; prompt and output together fit the context."""
    eos_token_ids: tuple[int, ...] = ()
    """End the output unless the user ignores them."""
    stop_token_ids: tuple[int, ...] = ()
    """Asked for by the user; end the output and are reported as the stop reason."""
    priority: int = 0
    arrival_time_s: float = 0.0
    """`time.monotonic` of the front."""
    cache_salt: str | None = None


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class RequestStatus(enum.Enum):
    """Where a request is in its life."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    """Waiting again, its blocks given back; it goes on from its tokens."""
    FINISHED = enum.auto()
