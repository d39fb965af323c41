"""What the processes of one run exchange: gradients once a step, and when to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGroup:
    """The processes of a run; with one of them nothing is exchanged."""

    rank: int = 0
    size: int = 1

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the workers, in one exchange."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= self.size
        pieces = flat.split([tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def share(self, value: float) -> float:
        """What worker 0 passed, in every worker; the others' values are ignored."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        distributed.broadcast(box, src=0)
        return box.item()


ALONE = WorkerGroup()
"""A run in one process."""
