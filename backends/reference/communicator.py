"""Collectives over gloo: host memory and TCP, for every device that torch knows.

A device whose links are faster than its host brings a communicator of its own. Nothing here touches
torch's global process group, so that groups of any shape may live side by side in one process.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed
from torch import Tensor

from quire.core.interface import (
    Communicator,
    ConfigError,
    DeviceError,
    DeviceLost,
    Reason,
    UnsupportedError,
)

_ADDRESS = re.compile(r"tcp://(?P<host>\[[^\]]+\]|[^:/]+):(?P<port>\d+)")
_HALF = (torch.float16, torch.bfloat16)
DEFAULT_TIMEOUT_S = 300.0
"""As long as the slowest rank may take to load its part of a model."""


class GlooCommunicator(Communicator):
    """One group. The first of `ranks` keeps the meeting place open at `address`.

    Tensors of another device go through host memory. Sums of float16 and bfloat16 are made in
    float32 and rounded once; every rank gets the same bits.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        *,
        rank: int,
        address: str,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """`rank` is this process's number among `ranks`.

        Raises: ConfigError for an address or a rank that cannot be; DeviceError if the others do
        not come within `timeout_s`.
        """
        if rank not in ranks or len(set(ranks)) != len(ranks):
            raise ConfigError(f"rank {rank} cannot join the group {list(ranks)}; each number once")
        self._rank = list(ranks).index(rank)
        self._world_size = len(ranks)
        host, port = _parse(address)
        with _typed(f"rank {rank} of {list(ranks)} could not meet the others at {address}"):
            self._group: torch.distributed.ProcessGroupGloo | None = _join(
                host, port, self._rank, self._world_size, timedelta(seconds=timeout_s)
            )

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def all_reduce(self, x: Tensor) -> Tensor:
        is_half = x.dtype in _HALF
        host = x.detach().to("cpu", torch.float32 if is_half else x.dtype).contiguous()
        if host.data_ptr() == x.data_ptr() and not x.is_contiguous():
            host = host.clone()
        with self._running("all_reduce") as group:
            group.allreduce([host]).wait()
        return host.to(x.device, x.dtype)

    def all_gather(self, x: Tensor, *, dim: int) -> Tensor:
        host = x.detach().cpu().contiguous()
        parts = [torch.empty_like(host) for _ in range(self._world_size)]
        with self._running("all_gather") as group:
            group.allgather([parts], [host]).wait()
        return torch.cat(parts, dim=dim).to(x.device)

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        if not 0 <= source < self._world_size:
            raise ConfigError(f"broadcast from rank {source} of {self._world_size}")
        host = x.detach().cpu().contiguous()
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with self._running("broadcast") as group:
            group.broadcast([host], options).wait()
        if host.data_ptr() != x.data_ptr():
            x.copy_(host)
        return x

    def barrier(self) -> None:
        with self._running("barrier") as group:
            group.barrier().wait()

    def close(self) -> None:
        self._group = None

    @contextmanager
    def _running(self, what: str) -> Iterator[torch.distributed.ProcessGroupGloo]:
        if self._group is None:
            raise DeviceError(f"{what} after the communicator was closed")
        with _typed(f"{what}: another rank of the {self._world_size} is gone or hangs"):
            yield self._group


def join_group(
    ranks: Sequence[int], *, rank: int, address: str, max_devices: int
) -> GlooCommunicator:
    """The communicator for a group within a device's claim.

    Raises: UnsupportedError for a group beyond it; otherwise as GlooCommunicator does.
    """
    if len(ranks) > max_devices:
        raise UnsupportedError(
            [
                Reason(
                    code="parallel.communicator",
                    need=f"a group of {len(ranks)} devices",
                    have=f"at most {max_devices}",
                    remedy=f"split the model over {max_devices} or fewer",
                )
            ],
            what="this group",
        )
    return GlooCommunicator(ranks, rank=rank, address=address)


def _parse(address: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"address {address!r} is not of the form tcp://host:port")
    return match["host"].strip("[]"), int(match["port"])


def _join(
    host: str, port: int, rank: int, world_size: int, timeout: timedelta
) -> torch.distributed.ProcessGroupGloo:
    store = torch.distributed.TCPStore(
        host, port, world_size, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    options = torch.distributed.ProcessGroupGloo._Options()  # noqa: SLF001 - torch has no other
    options._timeout = timeout  # noqa: SLF001
    own = _own_address(host, port)
    options._devices = [torch.distributed.ProcessGroupGloo.create_device(hostname=own)]  # noqa: SLF001
    return torch.distributed.ProcessGroupGloo(store, rank, world_size, options)


def _own_address(host: str, port: int) -> str:
    """The address under which this machine reaches, and is reached from, `host`. Sends nothing."""
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


@contextmanager
def _typed(what: str) -> Iterator[None]:
    """What torch and sockets raise, as an error of the contract's."""
    try:
        yield
    except (RuntimeError, OSError, torch.distributed.DistError) as error:
        raise DeviceLost(f"{what}: {str(error).splitlines()[0] if str(error) else error!r}") from (
            error
        )
