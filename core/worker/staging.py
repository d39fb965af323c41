"""A step's small tensors in one buffer: one copy to the device, one copy back.

Where host and device share one memory there is no copy: the device reads what the host wrote. A
buffer rests until the step that uses it is done, so an asynchronous device gets two of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.core.interface import Device
from quire.core.worker.step_arrays import Array

_ALIGNMENT = 64
_MAX_LAYOUTS = 256
"""Shapes remembered; more means that they do not repeat."""


class Field(NamedTuple):
    """One small tensor in a buffer. A tuple, since a step hashes and compares a dozen of them."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size_bytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class _Views:
    """One layout over a pair of buffers."""

    size_bytes: int
    host: dict[str, Array]
    device: dict[str, Tensor]


class StagingBuffer:
    """A host buffer and its twin on the device, seen as the fields of one layout at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._is_unified = device.capabilities.copy_mode == "unified"
        self._host = device.make_staging([0], "uint8")
        self._twin = self._host
        self._views: dict[tuple[Field, ...], _Views] = {}

    def upload(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """Copies arrays to the device, in one piece. Valid until the next upload into this buffer.

        The caller has made sure that the step that used the buffer before is done.
        """
        fields = tuple(
            Field(name, array.shape, _name_of(array.dtype)) for name, array in arrays.items()
        )
        views = self._layout(fields)
        for name, array in arrays.items():
            views.host[name][...] = array
        if not self._is_unified and views.size_bytes:
            size = views.size_bytes
            self._device.queue().upload(self._host[:size], self._twin[:size])
        return views.device

    def outputs(self, fields: Iterable[Field]) -> dict[str, Tensor]:
        """Device tensors for a step to write into, to be fetched by `download`."""
        return self._layout(tuple(fields)).device

    def download(self, fields: Iterable[Field]) -> dict[str, Array]:
        """Queues the copy back of what `outputs` gave; readable when a later event is done."""
        views = self._layout(tuple(fields))
        if not self._is_unified and views.size_bytes:
            size = views.size_bytes
            self._device.queue().download(self._twin[:size], self._host[:size])
        return views.host

    @property
    def size_bytes(self) -> int:
        """Memory on the device."""
        return self._twin.numel()

    def _layout(self, fields: tuple[Field, ...]) -> _Views:
        views = self._views.get(fields)
        if views is None:
            views = self._make_views(fields)
            self._views[fields] = views
        return views

    def _make_views(self, fields: tuple[Field, ...]) -> _Views:
        offsets, size = _offsets(fields)
        if size > self._host.numel():
            self._grow(size)
        if len(self._views) >= _MAX_LAYOUTS:
            self._views.clear()
        numpy_host = self._host.numpy()
        host, device = {}, {}
        for field, offset in zip(fields, offsets, strict=True):
            piece = slice(offset, offset + field.size_bytes)
            host[field.name] = numpy_host[piece].view(field.dtype).reshape(field.shape)
            device[field.name] = _seen_as(self._twin[piece], field)
        return _Views(size, host, device)

    def _grow(self, size: int) -> None:
        """Makes room for `size` bytes. The layouts seen so far were of the old buffers."""
        rounded = 1 << (size - 1).bit_length()
        # A queue may copy when inference mode is long left, and may then not write its tensors.
        with torch.inference_mode(mode=False):
            self._host = self._device.make_staging([rounded], "uint8")
            self._twin = self._host
            if not self._is_unified:
                torch_device = self._device.torch_device
                self._twin = torch.empty(rounded, dtype=torch.uint8, device=torch_device)
        self._views.clear()


@cache
def _name_of(dtype: np.dtype[np.generic]) -> str:
    """numpy spells the name anew at each question."""
    return dtype.name


def _offsets(fields: tuple[Field, ...]) -> tuple[list[int], int]:
    """Where each field begins, and the size of all."""
    offsets, size = [], 0
    for field in fields:
        offsets.append(size)
        size += -(-field.size_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, size


def _seen_as(piece: Tensor, field: Field) -> Tensor:
    dtype: torch.dtype = getattr(torch, field.dtype)
    if piece.numel() == 0:
        return torch.empty(field.shape, dtype=dtype, device=piece.device)
    return piece.view(dtype).view(field.shape)
