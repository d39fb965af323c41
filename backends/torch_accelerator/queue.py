"""A device's stream as a queue: copies from pinned memory, work and events in one order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quire.backends.torch_accelerator.errors import device_errors, losses
from quire.core.interface import Event, Queue


class StreamQueue(Queue):
    """Everything goes to the device's current stream and returns at once."""

    def __init__(self, torch_device: str) -> None:
        self._module: Any = torch.get_device_module(torch_device)
        self._device = torch.device(torch_device)

    def upload(self, staging: Tensor, target: Tensor) -> None:
        with device_errors("upload"):
            target.copy_(staging, non_blocking=True)

    def run(self, work: Callable[[], None]) -> None:
        with losses("step"), self._module.device(self._device):
            work()

    def download(self, source: Tensor, staging: Tensor) -> None:
        with device_errors("download"):
            staging.copy_(source, non_blocking=True)

    def record(self) -> Event:
        with device_errors("event"):
            event = self._module.Event()
            event.record(self._module.current_stream(self._device))
        return StreamEvent(event)


class StreamEvent(Event):
    """A point in a stream. Work that failed before it is told here."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def is_done(self) -> bool:
        with device_errors("step"):
            return bool(self._event.query())

    def wait(self) -> None:
        with device_errors("step"):
            self._event.synchronize()
