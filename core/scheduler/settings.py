"""The limits that the scheduler keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Complete and frozen; the names are those of `EngineConfig`."""

    max_num_seqs: int
    """The most requests that run at once."""
    max_num_batched_tokens: int
    """The most tokens that one step computes."""
    max_model_len: int
    """The most tokens of one request, prompt and output."""
    policy: str = "fcfs"
    """`fcfs`, or `priority` (a lower number goes first)."""
    enable_chunked_prefill: bool = True
    """Off: a prompt is computed in one step; only a preempted request that has outgrown a step
    resumes in chunks."""
    max_num_queued: int | None = None
    """The most requests that wait, beyond those for whom seats are free; None: no limit."""
    max_chunk_tokens: int | None = None
    """The most tokens of one request in a step, so that prompts share it; None: no limit."""
    num_guessed_tokens: int = 0
    """The most tokens that a step guesses ahead for one request; 0: none."""
