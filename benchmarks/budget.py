"""A program's time: parts that cannot end in it are left out and named, and none goes past it."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType

_LAST_S = 5.0
"""Kept back: who is stopped still has to write what was measured."""


class TimeUp(BaseException):
    """The time is over. No error: who catches those must not go on measuring."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One piece of a program."""

    name: str
    needs_s: float
    """What it takes at most, as far as anybody knows."""
    work: Callable[[], None]


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises TimeUp in the main thread once `seconds` have gone by."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal has it
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@dataclass(slots=True, kw_only=True)
class Budget:
    """Seconds for a whole program, from when this is made."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    stopping: Callable[[float], AbstractContextManager[None]] = stopped_after
    left_out: list[str] = field(default_factory=list)
    """Parts that were not begun, or not ended, each with why."""
    failed: list[str] = field(default_factory=list)
    """Parts that ended with an error, each with it."""
    was_stopped: bool = False
    _deadline: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        self._deadline = self.clock() + self.seconds

    @property
    def left_s(self) -> float:
        """Until the last part must have ended; never negative."""
        return max(0.0, self._deadline - _LAST_S - self.clock())

    def run(self, parts: Sequence[Part], after_each: Callable[[], None] = lambda: None) -> None:
        """Runs those that can end in time, in their order; mutates the lists of the others.

        A part that fails is named, and those after it run all the same.
        """
        for part in parts:
            left_s = self.left_s
            if part.needs_s > left_s or not left_s:
                self.left_out.append(
                    f"{part.name}: may take {part.needs_s:.0f} s, {math.floor(left_s)} s were left"
                )
                continue
            self._run_one(part, left_s)
            after_each()

    def _run_one(self, part: Part, left_s: float) -> None:
        begin = self.clock()
        try:
            with self.stopping(left_s):
                part.work()
        except TimeUp:
            self.was_stopped = True
            self.left_out.append(f"{part.name}: stopped after {self.clock() - begin:.0f} s")
        # Whatever a library, a driver or we do wrong: what else there is to measure is measured.
        except Exception as error:
            self.failed.append(f"{part.name}: {type(error).__name__}: {error}"[:500])
