"""What may be decided otherwise: order, chunk size, victim, admission. Pure functions, behind one replaceable object."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.errors import ConfigError
from quire.core.scheduler.request import Request


class SchedulingPolicy:
    """First come, first served. Subclass and replace any of the four decisions; the scheduler keeps
    the books, so that no decision can leak a block.
    """

    def order_key(self, request: Request) -> tuple[int, ...]:
        """Requests run and are admitted in ascending order of this key, which stays the same for a request's life."""
        return (request.arrival_index,)

    def chunk_size(self, num_missing: int, budget: int, num_others: int) -> int:
        """How many of `num_missing` tokens a request computes in a step that has room for `budget` more.

        `num_others` requests that run come after it; each is left one token, so that no long prompt stops their output.
        """
        return min(num_missing, max(1, budget - num_others))

    def choose_victim(self, candidates: Sequence[Request]) -> Request:
        """Who gives its blocks back when they run out. `candidates` are in order, none has had its turn in this step.

        The last: so the first always finishes.
        """
        return candidates[-1]

    def num_spare_blocks(self, num_running: int) -> int:
        """Blocks of each group that admission leaves free: one for the next of everyone who runs, lest the newcomer
        be preempted at once.
        """
        return num_running


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
