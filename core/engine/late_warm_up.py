"""What the start left for later, done in moments that no request waits for."""

from __future__ import annotations

import time
from collections.abc import Callable

from quire.core.executor.executor import Executor

_SHARE = 0.2
"""Of the time while requests run; those that run do without for so long."""


class LateWarmUp:
    """Hands the executor one piece of its remaining warm-up after the other."""

    def __init__(self, executor: Executor, clock: Callable[[], float] = time.monotonic) -> None:
        self._executor = executor
        self._clock = clock
        self._is_done = False
        self._not_before = float("-inf")

    def do_piece(self) -> bool:
        """One piece, however long it takes; whether others are left."""
        if self._is_done:
            return False
        began = self._clock()
        self._is_done = not self._executor.warm_up_more()
        ended = self._clock()
        self._not_before = ended + (ended - began) * (1 / _SHARE - 1)
        return not self._is_done

    def between_steps(self, num_waiting: int) -> None:
        """One piece if nobody waits for a first token, and not too soon after the last."""
        if not self._is_done and not num_waiting and self._clock() >= self._not_before:
            self.do_piece()
