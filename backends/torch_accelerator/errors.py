"""What torch raises for a device, as Quire's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.core.interface import DeviceLost, DeviceOutOfMemory

_REFUSED = "out of memory"


@contextmanager
def device_errors(tag: str) -> Iterator[None]:
    """Turns a refused allocation into DeviceOutOfMemory of `tag`, a dead device into DeviceLost.

    Everything else passes as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _REFUSED in str(error).lower():
            raise DeviceOutOfMemory(
                f"the device refused memory for {tag}: {_first_line(error)}; lower "
                "device_memory_fraction or max_num_seqs, or free the device of other processes",
                tag=tag,
            ) from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLost(
                f"the device failed ({tag}) and its memory is lost: {_first_line(error)}; restart "
                "the worker"
            ) from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
