"""Where a layer's weights lie on the host between their file and their packed form."""

from __future__ import annotations

import math
import mmap
import sys

import torch
from torch import Tensor

_LEAST_MAPPED_BYTES = 2**20
"""Smaller tensors are left to the allocator."""
_FREE = 2
"""References to a mapping that no tensor keeps: ours, and that of the question itself."""


class Staging:
    """Hands out tensors, in the same memory again where the last one is dropped.

    The heap would grow: what a layer's weights leave in it is filled by packed weights in part, and
    the next layer's find no room. A tenth of a model's size stayed so. Fresh memory for each layer
    would cost its page faults.
    """

    def __init__(self) -> None:
        self._mapped: mmap.mmap | None = None

    def take(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None
    ) -> Tensor:
        """A contiguous tensor with any contents; nobody else's while it or a view of it lives."""
        num_bytes = math.prod(shape) * dtype.itemsize
        is_host = device is None or torch.device(device).type == torch.empty(0).device.type
        if not is_host or num_bytes < _LEAST_MAPPED_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        if not self._is_free(num_bytes):
            self._mapped = None  # before there is another
            self._mapped = mmap.mmap(-1, num_bytes, **_private())
        assert self._mapped is not None
        flat = torch.frombuffer(self._mapped, dtype=dtype, count=math.prod(shape))
        return flat.view(shape)

    def _is_free(self, num_bytes: int) -> bool:
        """Whether the memory suffices and no tensor's storage keeps it."""
        if self._mapped is None or len(self._mapped) < num_bytes:
            return False
        return sys.getrefcount(self._mapped) <= _FREE


def _private() -> dict[str, int]:
    """Where systems tell memory of a process from memory that is shared."""
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return {}
    return {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
