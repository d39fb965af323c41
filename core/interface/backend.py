"""A vendor's factory, and one opened accelerator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quire.core.interface.contract import check_contract
from quire.core.interface.queue import ImmediateQueue, Queue

if TYPE_CHECKING:
    from torch import Tensor

    from quire.core.interface.attention import AttentionBackend, AttentionSpec
    from quire.core.interface.capabilities import Capabilities
    from quire.core.interface.communicator import Communicator
    from quire.core.interface.errors import Reason
    from quire.core.interface.graphs import GraphCapture
    from quire.core.interface.ops import Ops
    from quire.core.interface.worker import Worker, WorkerConfig


_IMMEDIATE = ImmediateQueue()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceInfo:
    """One device that a probe found, without opening it."""

    index: int
    """What `Backend.open` takes."""
    name: str
    """As the vendor sells it: `EPYC 9554`, `H200`."""
    architecture: str = ""
    """What kernels are chosen by: `sm_90`, `gfx942`, `avx512_bf16`."""
    total_memory_bytes: int | None = None
    """None: the driver does not say."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Anything a user might want to see: driver, instruction sets, kernels found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a backend found on this machine."""

    devices: tuple[DeviceInfo, ...] = ()
    problem: str = ""
    """Why there is no device, or what is worse than it could be; empty: nothing to say."""
    remedy: str = ""
    """What the user can do about `problem`."""
    priority: int = 0
    """Higher is preferred when the user did not choose; devices for tests are negative."""

    @property
    def is_usable(self) -> bool:
        """Whether there is a device to open."""
        return bool(self.devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryInfo:
    """A device's memory now, in bytes."""

    total_bytes: int
    free_bytes: int
    by_tag: Mapping[str, int] = field(default_factory=dict)
    """What Quire holds, by `weights`, `cache`, `activations`, `graphs`, `workspace`, where known.
    """


class Backend(ABC):
    """One family of accelerators: the class that an entry point of `quire.backends` names.

    Construction takes no argument, opens no device and imports no vendor SDK.
    """

    name: str
    """What `--device` takes: lower case, no spaces."""
    interface_version: str
    """The `MAJOR.MINOR` of the contract that this backend was written for."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, Backend)

    @abstractmethod
    def probe(self) -> Probe:
        """Which devices this machine has, or the reason why none.

        Cheap; initialises no driver context; never raises.
        """

    @abstractmethod
    def open(self, index: int) -> Device:
        """Opens device number `index`.

        Raises: DeviceError with a remedy if it cannot be opened.
        """


class Device(ABC):
    """One opened accelerator. Several may be open in one process, of several backends."""

    capabilities: Capabilities
    """The claims that the engine gates on. Fixed once the device is open."""
    info: DeviceInfo
    """Which device this is."""
    option_names: Collection[str] | None = None
    """Of `WorkerConfig.options`, those that the device reads (`acme.fast`). Others that begin with
    its name are refused; None: the device refuses what it does not know itself.
    """
    torch_device: str | None = None
    """What `torch.device()` takes for tensors that live here; None: torch does not own this device,
    and `make_worker` must be overridden."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, Device)

    @abstractmethod
    def memory(self) -> MemoryInfo:
        """What the device's memory holds now."""

    def measure_peak_bytes(self, work: Callable[[], None]) -> int:
        """Runs `work` and waits for it; how much more memory the device held at its peak.

        Right as it stands where allocators keep what they took from the driver; a device whose
        memory flows back at once measures in its own way.
        """
        before = self.memory().free_bytes
        work()
        self.synchronize()
        return max(0, before - self.memory().free_bytes)

    @abstractmethod
    def ops(self) -> Ops:
        """The operators of this device; the same object at each call.

        `quire.backends.reference.TorchDevice` answers with the reference.
        """

    @abstractmethod
    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """The attention for a group of layers that `spec` describes.

        Raises: UnsupportedError with every reason if the spec is beyond the claims.
        """

    def reasons_against(self, worker_config: WorkerConfig) -> Sequence[Reason]:
        """What in this configuration the device cannot do, beyond what `capabilities` says.

        Empty: nothing.
        """
        return ()

    def graphs(self) -> GraphCapture | None:
        """The device's way to freeze a step; None: steps run eagerly."""
        return None

    def queue(self) -> Queue:
        """The order of this device's work; the same object at each call."""
        return _IMMEDIATE

    def make_staging(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A host tensor that the device copies from and to fastest (pinned, where that helps).

        Contents are undefined.
        """
        import torch

        return torch.empty(tuple(shape), dtype=getattr(torch, dtype))

    def communicator(self, ranks: Sequence[int], *, rank: int, address: str) -> Communicator:
        """Joins the group `ranks` as `rank`, meeting the others at `address` (`tcp://host:port`).

        `rank` is one of `ranks`; `Communicator.rank` is its place among them.

        Raises: UnsupportedError if groups larger than one are not claimed.
        """
        from quire.core.interface.communicator import SoloCommunicator
        from quire.core.interface.errors import Reason, UnsupportedError

        if len(ranks) == 1:
            return SoloCommunicator()
        raise UnsupportedError(
            [
                Reason(
                    code="parallel.communicator",
                    need=f"a group of {len(ranks)} devices",
                    have="no communicator",
                    remedy="run on one device",
                )
            ]
        )

    def make_worker(self, config: WorkerConfig) -> Worker | None:
        """This device's own Worker; None: the core's.

        For a device with its own compiler or runtime.
        """
        return None

    def synchronize(self) -> None:  # noqa: B027 - synchronous devices have nothing to wait for
        """Returns when all work queued on the device is done."""

    def close(self) -> None:  # noqa: B027 - optional
        """Releases the device. Calling twice is harmless."""
