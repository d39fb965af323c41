"""What may be decided otherwise: order, chunk size, victim, admission.

Pure functions of what they are given, behind one object that can be replaced.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.errors import ConfigError
from quire.core.scheduler.request import Request

_WORTH_A_STEP = 64
"""Tokens of prefill that cost about as much as the step for which a request waits."""


class SchedulingPolicy:
    """First come, first served.

    Subclass it and replace any decision; the scheduler keeps the books, so that none can leak a
    block or change an output.
    """

    def order_key(self, request: Request) -> tuple[int, ...]:
        """Requests run and are admitted in ascending order of this key. Asked once for each."""
        return (request.arrival_index,)

    def chunk_size(self, num_missing: int, budget: int, num_others: int) -> int:
        """How many of `num_missing` tokens a request computes where a step has room for `budget`.

        `num_others` that run come after it; each is left one token, so that no long prompt stops
        their output.
        """
        return min(num_missing, max(1, budget - num_others))

    def choose_victim(self, candidates: Sequence[Request]) -> Request:
        """Who gives its blocks back when they run out: the last, so that the first always finishes.

        `candidates` are in order; none of them has had its turn in this step.
        """
        return candidates[-1]

    def num_spare_blocks(self, num_running: int) -> int:
        """Blocks of each group that an admission leaves free for those who run.

        One for each: everyone can have its next block before the newcomer must go again.
        """
        return num_running

    def waits_for_prefix(self, num_pending: int, num_missing: int) -> bool:
        """Whether a request lets another finish the prefix that both have in common.

        `num_pending` of its `num_missing` tokens are being computed by a request that runs, a step
        or a few from now. Waiting saves them, at the price of a step that is less full.
        """
        return num_pending >= _WORTH_A_STEP and 2 * num_pending >= num_missing


class PriorityPolicy(SchedulingPolicy):
    """A lower number goes first; among equals, who came first."""

    def order_key(self, request: Request) -> tuple[int, ...]:
        """Priority, then arrival."""
        return (request.priority, request.arrival_index)


def make_policy(name: str) -> SchedulingPolicy:
    """The policy that the configuration names.

    Raises: ConfigError for an unknown name.
    """
    if name == "fcfs":
        return SchedulingPolicy()
    if name == "priority":
        return PriorityPolicy()
    raise ConfigError(f"scheduling_policy is {name!r}; choose fcfs or priority")
