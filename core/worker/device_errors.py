"""What torch raises for a device, as Quire's errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.core.errors import DeviceLost, DeviceOutOfMemory, QuireError

_REFUSED = re.compile(
    r"out[ _]of[ _](\w+_)?memory|out_of_resources|can't allocate memory|not enough memory"
    r"|alloc_failed",
    re.IGNORECASE,
)
_LOST = re.compile(r"device[ _]lost", re.IGNORECASE)
_NUM_BYTES = re.compile(r"tried to allocate ([\d.]+) *(bytes|KiB|MiB|GiB)?", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@contextmanager
def device_errors(tag: str) -> Iterator[None]:
    """Turns a refused allocation into DeviceOutOfMemory of `tag`, a dead device into DeviceLost.

    Everything else passes as it is.
    """
    try:
        yield
    except QuireError:
        raise
    except MemoryError as error:
        raise _out_of_memory(error, tag) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _REFUSED.search(str(error)):
            raise _out_of_memory(error, tag) from error
        if isinstance(error, torch.AcceleratorError) or _LOST.search(str(error)):
            raise DeviceLost(
                f"the device failed ({tag}) and its memory is lost: {_first_line(error)}; restart "
                "the engine, and if it fails again reset the device"
            ) from error
        raise


def _out_of_memory(error: Exception, tag: str) -> DeviceOutOfMemory:
    return DeviceOutOfMemory(
        f"the device refused memory for {tag}: {_first_line(error)}; lower device_memory_fraction, "
        "max_num_batched_tokens or max_num_seqs",
        requested_bytes=_requested_bytes(str(error)),
        tag=tag,
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _requested_bytes(text: str) -> int | None:
    match = _NUM_BYTES.search(text)
    if match is None:
        return None
    return int(float(match[1]) * _UNITS[(match[2] or "bytes").lower()])
