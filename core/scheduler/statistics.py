"""Figures of the scheduler, for metrics and for people."""

from __future__ import annotations

import msgspec


class SchedulerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A moment's state, and counts since the start."""

    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    cache_usage: float
    """The share of blocks that is held, 0 to 1, of the fullest group."""
    num_steps: int
    num_scheduled_tokens: int
    """Computed in all steps, those of preempted requests counted each time."""
    num_sampled_tokens: int
    num_preemptions: int
    num_failed_steps: int
    num_guesses: int = 0
    """Tokens that were guessed ahead, and below those of them that were right."""
    num_right_guesses: int = 0
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int


class StepCounts(msgspec.Struct, kw_only=True):
    """What the scheduler counts while it works."""

    num_steps: int = 0
    num_scheduled_tokens: int = 0
    num_sampled_tokens: int = 0
    num_preemptions: int = 0
    num_failed_steps: int = 0
    num_guesses: int = 0
    num_right_guesses: int = 0
