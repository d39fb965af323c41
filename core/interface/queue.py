"""The order of a device's work: copies and computation, and when the host may look.

A step is: fill staging buffers, `upload` them, `run` the computation, `download` the results,
`record` an event. On an asynchronous device these return at once; then

    a staging buffer may not be written again before an event recorded after its upload is done
    a downloaded buffer may not be read before an event recorded after its download is done

The `sim` backend enforces both rules: it defers the work and poisons what may not be looked at yet.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from quire.core.interface.contract import check_contract

if TYPE_CHECKING:
    from torch import Tensor


class Event(ABC):
    """A point in a queue."""

    @abstractmethod
    def is_done(self) -> bool:
        """Whether everything queued before this point has happened. Does not wait."""

    @abstractmethod
    def wait(self) -> None:
        """Returns when it has. Raises: DeviceError for work before this point that failed."""


class Queue(ABC):
    """One device's work in order. Used by one thread."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, Queue)

    @abstractmethod
    def upload(self, staging: Tensor, target: Tensor) -> None:
        """Copies `staging` to `target`, of the same shape and dtype.

        `staging` lies on the host (of `Device.make_staging`), `target` on the device.
        """

    @abstractmethod
    def run(self, work: Callable[[], None]) -> None:
        """Runs `work`.

        It touches device tensors alone and leaves its results in buffers that live on.
        """

    @abstractmethod
    def download(self, source: Tensor, staging: Tensor) -> None:
        """Copies `source` (device) to `staging` (host), of the same shape and dtype."""

    @abstractmethod
    def record(self) -> Event:
        """Marks this point."""


class _PastEvent(Event):
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        return None


class ImmediateQueue(Queue):
    """The queue of a synchronous device: everything has happened on return."""

    def upload(self, staging: Tensor, target: Tensor) -> None:
        """Copies now."""
        target.copy_(staging)

    def run(self, work: Callable[[], None]) -> None:
        """Runs now."""
        work()

    def download(self, source: Tensor, staging: Tensor) -> None:
        """Copies now."""
        staging.copy_(source)

    def record(self) -> Event:
        """A point in the past."""
        return _PastEvent()
