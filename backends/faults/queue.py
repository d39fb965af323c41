"""A queue that slows copies down and makes steps fail."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from quire.backends.faults.schedule import FaultSchedule
from quire.core.interface import DeviceError, DeviceOutOfMemory, Event, Queue


class FaultsQueue(Queue):
    """Does its work at once; what fails is raised at once, or kept for whoever waits."""

    def __init__(self, schedule: FaultSchedule, *, is_asynchronous: bool) -> None:
        self._schedule = schedule
        self._is_asynchronous = is_asynchronous
        self._failure: DeviceError | None = None
        """Of work since the last event."""

    def upload(self, staging: Tensor, target: Tensor) -> None:
        self._dawdle()
        target.copy_(staging)

    def run(self, work: Callable[[], None]) -> None:
        try:
            self._begin_step()
            work()
        except DeviceError as error:
            if not self._is_asynchronous:
                raise
            self._failure = self._failure or error

    def download(self, source: Tensor, staging: Tensor) -> None:
        self._dawdle()
        staging.copy_(source)

    def record(self) -> Event:
        failure, self._failure = self._failure, None
        return FaultsEvent(failure)

    def _begin_step(self) -> None:
        schedule = self._schedule
        schedule.begin_step()
        if schedule.is_due(schedule.faults.lost_at_step):
            schedule.is_lost = True
        schedule.check_alive()
        if schedule.is_due(schedule.faults.hang_at_step):
            time.sleep(schedule.faults.hang_s)
        if schedule.is_due(schedule.faults.oom_at_step):
            raise DeviceOutOfMemory(
                f"memory was refused on purpose in step {schedule.step}", tag="activations"
            )

    def _dawdle(self) -> None:
        if self._schedule.faults.slow_copies_ms:
            time.sleep(self._schedule.faults.slow_copies_ms / 1000)


class FaultsEvent(Event):
    """A point in the past, and what failed before it."""

    def __init__(self, failure: DeviceError | None) -> None:
        self._failure = failure

    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        if self._failure is not None:
            raise self._failure
