"""Collectives through torch.distributed: NCCL, RCCL, XCCL; gloo where kernels are interpreted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from quire.backends.torch_accelerator.errors import device_errors
from quire.core.interface import Communicator, DeviceError, Reason, UnsupportedError


def join_group(
    ranks: Sequence[int], *, rank: int, address: str, backend: str, torch_device: str, limit: int
) -> Communicator:
    """Joins the group `ranks` as `rank`, one of them, meeting the others at `address`.

    Raises: UnsupportedError for more devices than `limit`; DeviceError where the group cannot meet.
    """
    if len(ranks) > limit:
        reason = Reason(
            code="parallel.communicator",
            need=f"a group of {len(ranks)} devices",
            have=f"{limit} on this machine",
            remedy=f"use at most {limit}",
        )
        raise UnsupportedError([reason], what="this group")
    if dist.is_initialized():
        raise DeviceError(
            "this process is in a group already, and torch keeps one for each process; start a "
            "process for each device"
        )
    number = list(ranks).index(rank)
    bound = None if backend == "gloo" else torch.device(torch_device)
    try:
        dist.init_process_group(
            backend, init_method=address, world_size=len(ranks), rank=number, device_id=bound
        )
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"rank {rank} could not join its group at {address} with {backend}: {error}; are all "
            "ranks started, and is the address free and reachable?"
        ) from error
    return TorchCommunicator(number, len(ranks))


class TorchCommunicator(Communicator):
    """The process's one group. On a device the work is queued on its stream."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        with device_errors("collective"):
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self._world_size)]
        with device_errors("collective"):
            dist.all_gather(parts, x)
        return torch.cat(parts, dim=dim)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        with device_errors("collective"):
            dist.broadcast(x, src=source)
        return x

    def barrier(self) -> None:
        with device_errors("collective"):
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
