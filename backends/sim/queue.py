"""A queue that does nothing until somebody waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from quire.core.interface import DeviceError, Event, Queue


class Backlog:
    """Work that waits, in order."""

    def __init__(self) -> None:
        self._pending: deque[Callable[[], None]] = deque()
        self._num_done = 0

    @property
    def end(self) -> int:
        """How many pieces of work there have been."""
        return self._num_done + len(self._pending)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._pending

    def add(self, work: Callable[[], None]) -> None:
        """Puts one more piece at the end."""
        self._pending.append(work)

    def has_reached(self, position: int) -> bool:
        """Whether so many pieces of work are done."""
        return self._num_done >= position

    def advance(self, position: int) -> None:
        """Does the work up to `position`, in order.

        What a piece of work raises is raised here, once.
        """
        while self._num_done < position:
            work = self._pending.popleft()
            self._num_done += 1
            work()

    def drain(self) -> None:
        """Does everything."""
        self.advance(self.end)


class DeferredQueue(Queue):
    """Keeps its work until an event is waited for, and poisons what is in flight.

    `upload` fills the target with poison at once, unless earlier work may still read it, and copies
    later; if the staging buffer has changed by then, that is an error. `download` fills the staging
    buffer with poison at once and copies later.
    """

    def __init__(self) -> None:
        self.backlog = Backlog()

    def upload(self, staging: Tensor, target: Tensor) -> None:
        expected = staging.clone()

        def copy() -> None:
            if not _same_bits(staging, expected):
                raise DeviceError(
                    "a staging buffer was written again before its upload was done; wait for an "
                    "event recorded after the upload"
                )
            target.copy_(expected)

        if self.backlog.is_idle:  # earlier work may still read the target, in its turn
            poison(target)
        self.backlog.add(copy)

    def run(self, work: Callable[[], None]) -> None:
        self.backlog.add(work)

    def download(self, source: Tensor, staging: Tensor) -> None:
        self.backlog.add(lambda: _copy(source, staging))
        poison(staging)

    def record(self) -> Event:
        return DeferredEvent(self.backlog, self.backlog.end)


class DeferredEvent(Event):
    """A number of pieces of work."""

    def __init__(self, backlog: Backlog, position: int) -> None:
        self._backlog = backlog
        self._position = position

    def is_done(self) -> bool:
        return self._backlog.has_reached(self._position)

    def wait(self) -> None:
        self._backlog.advance(self._position)


def poison(tensor: Tensor) -> None:
    """Fills a tensor with what no computation survives: NaN, or the lowest number of its kind.

    Mutates `tensor`.
    """
    if tensor.is_floating_point():
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).min)


def _copy(source: Tensor, staging: Tensor) -> None:
    staging.copy_(source)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))
