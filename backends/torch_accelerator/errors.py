"""What torch raises for a device, as Quire's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.core.interface import DeviceError, DeviceLost, DeviceOutOfMemory

_REFUSED = "out of memory"
_LOST = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "uncorrectable",
    "device_lost",
    "device lost",
)
"""In what a launch of Triton's or of the driver's says of work before it: an ordinary RuntimeError,
since torch was not asked."""


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
        if _is_lost(error):
            raise _device_lost(error, tag) from error
        raise


@contextmanager
def losses(tag: str) -> Iterator[None]:
    """Turns a dead device alone into DeviceLost; who asked for memory knows best what to lower."""
    try:
        yield
    except RuntimeError as error:
        if _is_lost(error):
            raise _device_lost(error, tag) from error
        raise


def _is_lost(error: RuntimeError) -> bool:
    if isinstance(error, DeviceError | torch.OutOfMemoryError):
        return False
    text = str(error).lower()
    return isinstance(error, torch.AcceleratorError) or any(word in text for word in _LOST)


def _device_lost(error: RuntimeError, tag: str) -> DeviceLost:
    return DeviceLost(
        f"the device failed ({tag}) and its memory is lost: {_first_line(error)}; restart "
        "the worker"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
