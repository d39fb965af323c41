"""Collectives between the devices of one group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from quire.core.interface.contract import check_contract

if TYPE_CHECKING:
    from torch import Tensor


class Communicator(ABC):
    """Collectives over `world_size` devices, of which this process drives number `rank`.

    Every rank of the group calls the same method with tensors of the same shape and dtype, in the
    same order. Results are safe to read in the order of the device's own queue.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, Communicator)

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process's number in the group, from 0."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """How many processes the group has."""

    @abstractmethod
    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, of x's shape and dtype. May write into `x` and return it."""

    @abstractmethod
    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        """The ranks' tensors joined along `dim` in the order of the ranks."""

    @abstractmethod
    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """Writes rank `source`'s tensor into `x` on every rank and returns it."""

    @abstractmethod
    def barrier(self) -> None:
        """Returns when every rank has called it."""

    def close(self) -> None:  # noqa: B027 - optional: most groups have nothing to release
        """Releases what the group holds. Calling twice is harmless."""


class SoloCommunicator(Communicator):
    """The group of one: every collective is the identity."""

    @property
    def rank(self) -> int:
        """0."""
        return 0

    @property
    def world_size(self) -> int:
        """1."""
        return 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """`x`."""
        return x

    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        """`x`."""
        return x

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        """`x`."""
        return x

    def barrier(self) -> None:
        """Returns at once."""
