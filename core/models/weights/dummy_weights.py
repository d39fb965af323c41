"""Random weights in a model's shapes, for measuring and for tests where no files are wanted."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from quire.core.models.weights.weight_layout import TensorShape

_POOL_SIZE = 4_194_301
"""A prime, so that no row length divides it and no two rows of a matrix are the same."""


class DummyWeights:
    """Makes tensors up. The same seed makes the same weights.

    All come from one pool of normal numbers, each from a place of its own: copying is ten times as
    fast as drawing.
    """

    def __init__(self, seed: int, *, norm_offset: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(_POOL_SIZE, generator=generator)
        self._norm_weight = 1.0 - norm_offset

    def read(self, tensor: TensorShape) -> Tensor:
        """float32, of the tensor's shape: norms of 1, biases of 0, the rest N(0, 1 / fan_in)."""
        if len(tensor.shape) == 1:
            is_bias = tensor.name.endswith(".bias")
            return torch.full(tensor.shape, 0.0 if is_bias else self._norm_weight)
        start = zlib.crc32(tensor.name.encode()) % _POOL_SIZE
        num_elements = tensor.num_elements
        numbers = torch.empty(num_elements)
        filled = 0
        while filled < num_elements:
            piece = self._pool[start : start + num_elements - filled]
            numbers[filled : filled + len(piece)] = piece
            filled, start = filled + len(piece), 0
        return numbers.view(tensor.shape).mul_(tensor.shape[-1] ** -0.5)

    def read_into(self, tensor: TensorShape, target: Tensor) -> None:
        """The same numbers, written to `target`, of the tensor's shape."""
        target.copy_(self.read(tensor))
