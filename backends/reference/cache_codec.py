"""How keys and values are kept in the dtype of a cache, and read back.

float8 saturates at its largest number. int8 has one float32 scale for each token and head, the
largest magnitude over 127, in a tensor of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.interface import CacheTensor

NARROW = ("float8_e4m3fn", "float8_e5m2", "int8")
"""Cache dtypes beside the plain ones."""


class CacheCodec:
    """Writes and reads one of the tensors `k` and `v` of a layer's cache, with its scales."""

    def __init__(self, cache_dtype: str) -> None:
        self._dtype: torch.dtype = getattr(torch, cache_dtype)
        self._name = cache_dtype

    def layout(self, name: str, block_shape: tuple[int, ...]) -> tuple[CacheTensor, ...]:
        """What is kept for `name` [B, H, D]: the numbers, and for int8 their scales [B, H]."""
        numbers = CacheTensor(name=name, block_shape=block_shape, dtype=self._name)
        if self._name != "int8":
            return (numbers,)
        scales = CacheTensor(name=f"{name}_scale", block_shape=block_shape[:-1], dtype="float32")
        return (numbers, scales)

    def write(self, tensors: dict[str, Tensor], name: str, slots: Tensor, new: Tensor) -> None:
        """new [T, H, D] into the slots int64 [T] of `name`."""
        if self._name == "int8":
            wide = new.float()
            scale = wide.abs().amax(-1).div_(127)
            steps = wide / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
            tensors[f"{name}_scale"].flatten(0, 1).index_copy_(0, slots, scale)
            new = steps.round_().clamp_(-127, 127)
        elif self._dtype.itemsize == 1:
            limit = torch.finfo(self._dtype).max
            new = new.float().clamp(-limit, limit)
        stored = new.to(self._dtype)
        as_bits(tensors[name]).flatten(0, 1).index_copy_(0, slots, as_bits(stored))

    def read(self, tensors: dict[str, Tensor], name: str, rows: Tensor, to: torch.dtype) -> Tensor:
        """Rows of `name` seen as [slots * H, D]: [n, D] in dtype `to`."""
        tensor = tensors[name]
        width = tensor.shape[-1]
        taken = as_bits(tensor).view(-1, width).index_select(0, rows)
        wide = taken.view(self._dtype).to(to)
        if self._name != "int8":
            return wide
        scales = tensors[f"{name}_scale"].view(-1).index_select(0, rows)
        return wide * scales.unsqueeze(-1).to(to)


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory in a dtype that torch can index: its operators on float8 are few."""
    is_float8 = tensor.dtype.itemsize == 1 and tensor.dtype.is_floating_point
    return tensor.view(torch.uint8) if is_float8 else tensor
