"""What a user gets back; the names are those of vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Logprob:
    """The log-probability of one token at one position."""

    logprob: float
    rank: int | None = None
    """1: the most likely."""
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""By token id: the chosen token first, then the most likely ones."""


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One of the `n` outputs of a prompt."""

    index: int
    text: str
    """All of it, or what came since the last output where deltas were asked."""
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    """One for each entry of `token_ids`."""
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; None: it goes on."""
    stop_reason: int | str | None = None
    """The stop string or token id that ended it; None for the end-of-sequence token."""

    @property
    def is_finished(self) -> bool:
        """Whether no more comes."""
        return self.finish_reason is not None


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Times in seconds on the clock of `time.monotonic`, and counts."""

    arrival_time_s: float
    first_scheduled_time_s: float | None = None
    first_token_time_s: float | None = None
    last_token_time_s: float | None = None
    finished_time_s: float | None = None
    num_preemptions: int = 0


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A prompt and what came of it, so far or in the end."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    is_finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """The first entry is None: nothing predicts the first token."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache held."""
    metrics: RequestMetrics | None = None
    error: str | None = None
    """Why the request failed, where it failed alone."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """`is_finished`, by the name that vLLM uses."""
        return self.is_finished
