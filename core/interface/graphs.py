"""Freezing a step: record it once, replay it with new data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from quire.core.interface.contract import check_contract

if TYPE_CHECKING:
    from torch import Tensor


class CapturedStep(ABC):
    """One recorded step. Its inputs and outputs live at fixed addresses."""

    @abstractmethod
    def replay(self) -> None:
        """Runs the recorded work on what the static input buffers hold now.

        The outputs are the buffers that the captured function wrote; they are safe to read in the
        order of the device's queue, and are overwritten by the next replay.
        """


class GraphCapture(ABC):
    """A device's way to record a step: capture and replay, or compile for one shape."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, GraphCapture)

    @abstractmethod
    def capture(self, key: str, step: Callable[[], None]) -> CapturedStep:
        """Records `step`.

        `step` reads and writes static buffers alone and allocates nothing that outlives it. `key`
        names the shape, for messages. `step` may be called several times to warm up.
        Raises: DeviceOutOfMemory if the recording does not fit; UnsupportedError if `step` cannot
        be recorded.
        """

    def fill(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copies each (source, target), tensors of the device, before a replay reads the targets.

        Shapes are the same; targets may be parts of larger buffers. Override it where the device
        can copy many small tensors at once.
        """
        for source, target in pairs:
            target.copy_(source)

    def release(self) -> None:  # noqa: B027 - optional
        """Drops every recording and its memory."""
