"""What each rank of level 4 runs: one function a check, in the rank's own process.

Arguments and answers are numpy arrays; numbers of half precision travel as float64, which holds
them exactly.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.core.interface import Communicator, Device

Array = npt.NDArray[Any]
_LATE_S = 0.3


@contextmanager
def joined(device: Device, rank: int, address: str, ranks: Sequence[int]) -> Iterator[Communicator]:
    """A communicator of `ranks`, closed at the end."""
    group = device.communicator(ranks, rank=rank, address=address)
    try:
        yield group
    finally:
        group.close()


def placed(device: Device, array: Array, dtype: str) -> torch.Tensor:
    """A tensor on the device."""
    return torch.from_numpy(array.copy()).to(getattr(torch, dtype)).to(str(device.torch_device))


def fetched(device: Device, tensor: torch.Tensor) -> Array:
    """A tensor's numbers on the host, exactly, once the device's queue has come so far."""
    device.queue().record().wait()
    host = tensor.detach().cpu()
    return np.asarray((host.double() if host.is_floating_point() else host).numpy()).copy()


def who_am_i(device: Device, rank: int, address: str, world: int) -> tuple[int, int]:
    """(rank, world size) by the communicator's own word."""
    with joined(device, rank, address, range(world)) as group:
        return group.rank, group.world_size


def all_reduce(
    device: Device, rank: int, address: str, world: int, inputs: Sequence[Array], dtype: str
) -> list[Array]:
    """The sum of each input, one after another in one group."""
    with joined(device, rank, address, range(world)) as group:
        return [fetched(device, group.all_reduce(placed(device, x, dtype))) for x in inputs]


def all_gather(
    device: Device, rank: int, address: str, world: int, x: Array, dtype: str
) -> list[Array]:
    """The input gathered along each dimension, the last one also as -1."""
    with joined(device, rank, address, range(world)) as group:
        dims = (*range(x.ndim), -1)
        return [
            fetched(device, group.all_gather(placed(device, x, dtype), dim=dim)) for dim in dims
        ]


def broadcast(
    device: Device, rank: int, address: str, world: int, x: Array, dtype: str
) -> list[tuple[Array, Array]]:
    """(the argument afterwards, what was returned) for each source."""
    answers = []
    with joined(device, rank, address, range(world)) as group:
        for source in range(world):
            tensor = placed(device, x + source, dtype)
            returned = group.broadcast(tensor, source=source)
            answers.append((fetched(device, tensor), fetched(device, returned)))
    return answers


def strided(
    device: Device, rank: int, address: str, world: int, whole: Array
) -> tuple[Array, Array, Array, Array]:
    """Every other column of `whole`: (sum, gathered, broadcast, `whole` after the last two)."""
    with joined(device, rank, address, range(world)) as group:
        reduced = fetched(device, group.all_reduce(placed(device, whole, "float32")[:, ::2]))
        tensor = placed(device, whole, "float32")
        gathered = fetched(device, group.all_gather(tensor[:, ::2], dim=1))
        sent = fetched(device, group.broadcast(tensor[:, ::2], source=world - 1))
        return reduced, gathered, sent, fetched(device, tensor)


def barrier(device: Device, rank: int, address: str, world: int, folder: str) -> list[int]:
    """How many ranks had come when each barrier opened; every rank is late once."""
    seen = []
    with joined(device, rank, address, range(world)) as group:
        for late in range(world):
            if rank == late:
                time.sleep(_LATE_S)
            (Path(folder) / f"{late}-{rank}").touch()
            group.barrier()
            seen.append(sum((Path(folder) / f"{late}-{r}").exists() for r in range(world)))
            group.barrier()
    return seen


def in_the_queue(device: Device, rank: int, address: str, world: int, x: Array) -> Array:
    """Upload, double, reduce, add one, download: each queued behind the one before."""
    queue = device.queue()
    where = str(device.torch_device)
    up = device.make_staging(x.shape, "float32")
    down = device.make_staging(x.shape, "float32")
    up.copy_(torch.from_numpy(x))
    target = torch.zeros(x.shape, device=where)
    with joined(device, rank, address, range(world)) as group:

        def work() -> None:
            target.mul_(2)
            target.copy_(group.all_reduce(target.clone()))
            target.add_(1)

        queue.upload(up, target)
        queue.run(work)
        queue.download(target, down)
        queue.record().wait()
        return np.asarray(down.numpy()).copy()


def two_groups(
    device: Device, rank: int, addresses: Sequence[str], groups: Sequence[Sequence[int]], x: Array
) -> list[Array | None]:
    """The gathered ranks' tensors of each group that this rank is in; the groups take turns."""
    mine = [
        device.communicator(ranks, rank=rank, address=address) if rank in ranks else None
        for ranks, address in zip(groups, addresses, strict=True)
    ]
    answers: list[Array | None] = [None] * len(groups)
    for _ in range(2):
        for number, group in enumerate(mine):
            if group is not None:
                gathered = group.all_gather(placed(device, x, "float32"), dim=0)
                answers[number] = fetched(device, gathered)
    for group in mine:
        if group is not None:
            group.close()
    return answers


def lost_rank(device: Device, rank: int, address: str, world: int, x: Array) -> float:
    """The last rank dies between two collectives; the others call the second."""
    with joined(device, rank, address, range(world)) as group:
        group.barrier()
        if rank == world - 1:
            os._exit(0)
        fetched(device, group.all_reduce(placed(device, x, "float32")))
    return 0.0


def closes_twice(device: Device, rank: int, addresses: Sequence[str], world: int) -> list[Array]:
    """Groups of the same ranks, one after another, each closed twice."""
    answers = []
    for address in addresses:
        group = device.communicator(range(world), rank=rank, address=address)
        answers.append(fetched(device, group.all_reduce(placed(device, np.ones(3), "float32"))))
        group.barrier()
        group.close()
        group.close()
    return answers
