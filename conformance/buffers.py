"""Buffers with a moat: a view in the middle of a larger allocation, whose rest must not change."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.conformance.trial import Finding

_MOAT = 64
"""Elements before and after; more than one vector of any instruction set."""
_INTEGER_CANARY = 3
"""Integers are often indices: a stray one must be harmless to whoever reads it by mistake."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Guarded:
    """One tensor on the device, its surroundings, and what it held at first."""

    view: Tensor
    whole: Tensor
    """Flat: moat, tensor, moat."""
    before: Tensor
    """A copy of `whole`, on the host."""

    def check(self, name: str, *, may_change: bool) -> None:
        """Raises Finding if the moat changed, or the tensor where it may not."""
        now = _bits(self.whole.cpu())
        was = _bits(self.before)
        width = self.before.element_size() * _MOAT
        if not (torch.equal(now[:width], was[:width]) and torch.equal(now[-width:], was[-width:])):
            raise Finding(
                f"memory around {name!r} was overwritten: the operator writes beyond the ends of "
                "its buffer"
            )
        if not may_change and not torch.equal(now, was):
            raise Finding(
                f"the input {name!r} was changed; the operator's specification lists what it may "
                "write, and this is not among it"
            )


def guard(tensor: Tensor, device: str) -> Guarded:
    """A copy of a host tensor on the device, surrounded by canaries."""
    count = tensor.numel()
    canary = float("nan") if tensor.is_floating_point() else _INTEGER_CANARY
    whole = torch.full((count + 2 * _MOAT,), canary, dtype=tensor.dtype)
    whole[_MOAT : _MOAT + count] = tensor.reshape(-1)
    placed = whole.to(device, copy=True)
    view = placed[_MOAT : _MOAT + count].view(tensor.shape)
    return Guarded(view=view, whole=placed, before=whole)


def guard_all(tensors: Mapping[str, Tensor], device: str) -> dict[str, Guarded]:
    """Several at once."""
    return {name: guard(tensor, device) for name, tensor in tensors.items()}


def check_all(guarded: Mapping[str, Guarded], *, writes: Collection[str]) -> None:
    """Checks every moat, and that only `writes` changed."""
    for name, buffer in guarded.items():
        buffer.check(name, may_change=name in writes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, bit for bit, NaN included."""
    return a.shape == b.shape and bool(torch.equal(_bits(a.cpu()), _bits(b.cpu())))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
