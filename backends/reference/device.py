"""A device that torch already knows, with the reference for everything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch

from quire.backends.reference.attention import ReferenceAttention
from quire.backends.reference.host_memory import PeakMemory
from quire.backends.reference.ops import ReferenceOps
from quire.core.interface import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    Communicator,
    Device,
    DeviceInfo,
    MemoryInfo,
    Ops,
    SoloCommunicator,
    UnsupportedError,
)


class TorchDevice(Device):
    """One opened torch device. Vendors override the parts that their hardware does better."""

    torch_device: str

    def __init__(
        self,
        *,
        info: DeviceInfo,
        torch_device: str = "cpu",
        capabilities: Capabilities | None = None,
    ) -> None:
        self.info = info
        self.torch_device = torch_device
        self.capabilities = capabilities or Capabilities()
        self._ops = self._make_ops()

    def _make_ops(self) -> Ops:
        """The operators; called once, while the device opens."""
        return ReferenceOps()

    def _attention_class(self, spec: AttentionSpec) -> type[ReferenceAttention]:
        """Who serves layers of `spec`."""
        return ReferenceAttention

    def ops(self) -> Ops:
        return self._ops

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        chosen = self._attention_class(spec)
        reasons = chosen.reasons_against(spec)
        if reasons:
            raise UnsupportedError(reasons, what=f"attention on {self.info.name}")
        return chosen(spec, self.torch_device)

    def communicator(self, ranks: Sequence[int], *, rank: int, address: str) -> Communicator:
        """Through host memory. `rank` is one of `ranks`; the first of them opens `address`."""
        if len(ranks) == 1:
            return SoloCommunicator()
        # Here: only who splits a model needs torch's distributed package.
        from quire.backends.reference.communicator import join_group

        limit = self.capabilities.max_tensor_parallel
        return join_group(ranks, rank=rank, address=address, max_devices=limit)

    def memory(self) -> MemoryInfo:
        device = torch.device(self.torch_device)
        if device.type == "cpu":
            return _host_memory()
        free_bytes, total_bytes = torch.get_device_module(device).mem_get_info(device)
        return MemoryInfo(total_bytes=total_bytes, free_bytes=free_bytes, by_tag=self._tags())

    def measure_peak_bytes(self, work: Callable[[], None]) -> int:
        if torch.device(self.torch_device).type != "cpu":
            return super().measure_peak_bytes(work)
        with PeakMemory() as peak:
            work()
            self.synchronize()
        return peak.size_bytes

    def _tags(self) -> Mapping[str, int]:
        """Bytes held by what, where the device knows."""
        return {}

    def synchronize(self) -> None:
        device = torch.device(self.torch_device)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize(device)


def _host_memory() -> MemoryInfo:
    page = os.sysconf("SC_PAGE_SIZE")
    return MemoryInfo(
        total_bytes=page * os.sysconf("SC_PHYS_PAGES"),
        free_bytes=page * os.sysconf("SC_AVPHYS_PAGES"),
    )
