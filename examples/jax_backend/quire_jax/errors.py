"""What JAX raises, as the contract's errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from jax.errors import JaxRuntimeError

from quire.core.interface import DeviceLost, DeviceOutOfMemory

_REFUSED = re.compile(r"RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
_NUM_BYTES = re.compile(r"allocat\w* (\d+) bytes", re.IGNORECASE)


@contextmanager
def jax_errors(tag: str) -> Iterator[None]:
    """Turns a refused allocation into DeviceOutOfMemory, a runtime that fails into DeviceLost.

    `tag` says what memory is for. Everything else passes as it is.
    """
    try:
        yield
    except (MemoryError, JaxRuntimeError) as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, MemoryError) or _REFUSED.search(text):
            raise out_of_memory(tag, text) from error
        raise DeviceLost(f"XLA's runtime failed in a step: {text}; restart the worker") from error


def out_of_memory(tag: str, why: str, requested_bytes: int | None = None) -> DeviceOutOfMemory:
    """A refused allocation for `tag`."""
    found = _NUM_BYTES.search(why)
    return DeviceOutOfMemory(
        f"the device refused memory for {tag}: {why}; lower device_memory_fraction, "
        "max_num_batched_tokens or max_num_seqs",
        requested_bytes=requested_bytes or (int(found[1]) if found else None),
        tag=tag,
    )
