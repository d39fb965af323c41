"""What torch, Triton and drivers raise for a device, as Quire's errors.

Only the first line of a message is read: torch ends every error of CUDA and HIP with advice that
names other errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.core.interface import DeviceError, DeviceLost, DeviceOutOfMemory

_REFUSED = (
    "out of memory",
    "out_of_device_memory",
    "out_of_host_memory",
    "out_of_resources",
    "status_alloc_failed",
)
"""Of the allocator, of a driver and of a library that could not make its workspace."""
_LOST = (
    "illegal memory access",
    "unspecified launch failure",
    "device-side assert",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "hardware stack error",
    "launch timed out",
    "uncorrectable",
    "device_lost",
    "device lost",
)
"""In what a launch of Triton's or of the driver's says of work before it: an ordinary RuntimeError,
since torch was not asked."""
_WITHOUT_CODE = ("no kernel image", "invalid device function")
_HARMLESS = (
    *_WITHOUT_CODE,
    "captur",
    "invalid argument",
    "invalid configuration",
    "invalid resource handle",
    "invalid device ordinal",
    "not supported",
    "driver version is insufficient",
)
"""In an AcceleratorError of a call that was refused; the device's memory is as it was."""
_BUILD_REMEDY = "install a build of torch that is made for this device (see `quire doctor`)"


@contextmanager
def device_errors(tag: str) -> Iterator[None]:
    """Turns a refused allocation into DeviceOutOfMemory of `tag`, a dead device into DeviceLost.

    A call that torch's device refused is a DeviceError. Everything else passes as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if _is_refused(error):
            raise DeviceOutOfMemory(
                f"the device refused memory for {tag}: {_first_line(error)}; lower "
                "device_memory_fraction or max_num_seqs, or free the device of other processes",
                tag=tag,
            ) from error
        _raise_failed(error, tag)
        raise


@contextmanager
def losses(tag: str) -> Iterator[None]:
    """As `device_errors`, but refused memory is torch's OutOfMemoryError, whoever refused it.

    Who asked for it knows best what to lower.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if _is_refused(error):
            raise torch.OutOfMemoryError(f"out of memory: {_first_line(error)}") from error
        _raise_failed(error, tag)
        raise


@contextmanager
def opening_errors(what: str, remedy: str) -> Iterator[None]:
    """Whatever keeps a device from being opened, as one typed error with the remedy.

    `remedy`: what helps where the driver is missing or too old.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        line = _first_line(error)
        if _is_refused(error):
            raise DeviceOutOfMemory(
                f"{what} has no memory left to be opened: {line}; end the processes that hold it, "
                "or choose another device",
                tag="context",
            ) from error
        if _names(error, _LOST):
            raise DeviceLost(
                f"{what} has failed and cannot be opened: {line}; reset the device, or restart the "
                "machine"
            ) from error
        helps = _BUILD_REMEDY if _names(error, _WITHOUT_CODE) else remedy
        raise DeviceError(f"{what} cannot be opened: {line}; {helps}") from error


def _raise_failed(error: Exception, tag: str) -> None:
    """Raises DeviceLost or DeviceError for what only a device says; else returns."""
    if isinstance(error, torch.OutOfMemoryError):
        return
    is_torchs = isinstance(error, torch.AcceleratorError)
    if _names(error, _LOST) or (is_torchs and not _names(error, _HARMLESS)):
        raise DeviceLost(
            f"the device failed ({tag}) and its memory is lost: {_first_line(error)}; restart the "
            "engine, and if it fails again reset the device"
        ) from error
    if _names(error, _WITHOUT_CODE):
        raise DeviceError(
            f"there is no code for this device ({tag}): {_first_line(error)}; {_BUILD_REMEDY}"
        ) from error
    if is_torchs:
        raise DeviceError(
            f"the device refused a call ({tag}): {_first_line(error)}; restart the engine, and "
            "report this with the device's name and the versions of `quire doctor`"
        ) from error


def _is_refused(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or _names(error, _REFUSED)


def _names(error: Exception, words: tuple[str, ...]) -> bool:
    text = _first_line(error).lower()
    return any(word in text for word in words)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
