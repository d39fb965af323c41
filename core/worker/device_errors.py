"""What torch raises for a device, as Quire's errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from quire.core.errors import DeviceLost, DeviceOutOfMemory, QuireError

_REFUSED = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
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
        if isinstance(error, torch.AcceleratorError):
            raise DeviceLost(
                f"the device failed in a step and its memory is lost: {error}; restart the worker"
            ) from error
        raise


def _out_of_memory(error: Exception, tag: str) -> DeviceOutOfMemory:
    text = str(error).partition("\n")[0] or type(error).__name__
    return DeviceOutOfMemory(
        f"the device refused memory for {tag}: {text}; lower device_memory_fraction, "
        "max_num_batched_tokens or max_num_seqs",
        requested_bytes=_requested_bytes(str(error)),
        tag=tag,
    )


def _requested_bytes(text: str) -> int | None:
    match = _NUM_BYTES.search(text)
    if match is None:
        return None
    return int(float(match[1]) * _UNITS[(match[2] or "bytes").lower()])
