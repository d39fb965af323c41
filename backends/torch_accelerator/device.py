"""One opened accelerator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from quire.backends.reference import ReferenceAttention, TorchDevice
from quire.backends.torch_accelerator.attention import TritonAttention
from quire.backends.torch_accelerator.errors import device_errors, opening_errors
from quire.backends.torch_accelerator.graphs import ReplayedCalls, TorchGraphs, offers_graphs
from quire.backends.torch_accelerator.ops import TritonOps
from quire.backends.torch_accelerator.providers.catalog import (
    ATTENTION,
    OPS,
    TRITON,
    Provider,
    find_provider,
)
from quire.backends.torch_accelerator.queue import StreamQueue
from quire.backends.torch_accelerator.vendor import Vendor
from quire.core.interface import (
    AttentionBackend,
    AttentionSpec,
    Capabilities,
    Communicator,
    DeviceError,
    DeviceInfo,
    DeviceLost,
    GraphCapture,
    ImmediateQueue,
    MemoryInfo,
    Ops,
    Queue,
    Reason,
    SoloCommunicator,
    UnsupportedError,
    Worker,
    WorkerConfig,
)
from quire.kernels_triton.launch import TABLES, DeviceLauncher, LaunchTable, read_table

_BLOCK_SIZES = (16, 32, 64, 128, 256, 8)
_HALVES = ("bfloat16", "float16")
_WIDE = "float32"
_FEATURES = frozenset({"moe", "quantized_experts", "recurrent", "state_slots", "cache_rows"})
_QUANTIZATIONS = frozenset({"int8", "int4", "fp8"})


def open_device(
    vendor: Vendor, info: DeviceInfo, *, num_devices: int, is_interpreted: bool
) -> AcceleratorDevice:
    """Opens a device, and with it the driver's context.

    Raises: DeviceError with the remedy where the driver refuses or torch has no code for the
    device; DeviceOutOfMemory where it has no memory left for a context; DeviceLost.
    """
    if is_interpreted:
        from quire.kernels_triton import interpreter

        if not interpreter.is_interpreting():
            raise DeviceError(
                f"{vendor.name} was asked to interpret its kernels in a process that has compiled "
                "some; set TRITON_INTERPRET=1 before the process starts"
            )
        interpreter.install()
        table = read_table(TABLES / "interpreter.json")
        claims = _interpreted_claims(vendor, info)
        return AcceleratorDevice(vendor, info, "cpu", claims, table)
    torch_device = f"{vendor.torch_type}:{info.index}"
    with opening_errors(f"{vendor.name}:{info.index} ({info.name})", vendor.driver_remedy):
        # A kernel, and waiting for it: a build of torch without code for this device fails here.
        torch.zeros(1, device=torch_device)
        module = torch.get_device_module(torch_device)
        module.set_device(torch_device)
        module.synchronize(torch_device)
    path = vendor.read_tables(info.architecture) or TABLES / "portable.json"
    claims = _claims(vendor, info, num_devices)
    if not offers_graphs(module):
        claims = replace(claims, step_mode="eager")
    return AcceleratorDevice(vendor, info, torch_device, claims, read_table(path))


class AcceleratorDevice(TorchDevice):
    """A device of torch's, with Triton's kernels, an asynchronous queue and recorded steps."""

    def __init__(
        self,
        vendor: Vendor,
        info: DeviceInfo,
        torch_device: str,
        capabilities: Capabilities,
        table: LaunchTable,
    ) -> None:
        self._vendor = vendor
        self._wants = {what: f"{vendor.name}.{what}" for what in (ATTENTION, OPS)}
        self.option_names = tuple(self._wants.values())
        self._launcher = DeviceLauncher(table)
        self._chosen_attention: type[TritonAttention] = TritonAttention
        super().__init__(info=info, torch_device=torch_device, capabilities=capabilities)
        self._is_interpreted = torch_device == "cpu"
        self._queue: Queue = ImmediateQueue() if self._is_interpreted else StreamQueue(torch_device)

    def _make_ops(self) -> Ops:
        units = self._vendor.architecture(self.info.architecture).fp8_units
        return TritonOps(self._launcher, units)

    def _attention_class(self, spec: AttentionSpec) -> type[ReferenceAttention]:
        return self._chosen_attention

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        reasons = self._chosen_attention.reasons_against(spec)
        if reasons:
            raise UnsupportedError(reasons, what=f"attention on {self.info.name}")
        return self._chosen_attention(spec, self.torch_device, self._launcher)

    def reasons_against(self, worker_config: WorkerConfig) -> Sequence[Reason]:
        """A library that is asked for and not there is refused, never replaced silently."""
        found = [self._find(what, worker_config) for what in self._wants]
        return [reason for reason in found if isinstance(reason, Reason)]

    def make_worker(self, config: WorkerConfig) -> Worker | None:
        """Takes the libraries that were asked for, and leaves the work to the core's worker.

        Raises: UnsupportedError if one is not there; ImportError if it is and does not load.
        """
        reasons = self.reasons_against(config)
        if reasons:
            raise UnsupportedError(reasons, what=f"a library on {self.info.name}")
        attention, ops = (self._find(what, config) for what in (ATTENTION, OPS))
        if isinstance(attention, Provider):
            self._chosen_attention = attention.load()
        if isinstance(ops, Provider) and ops.load_ops is not None:
            units = self._vendor.architecture(self.info.architecture).fp8_units
            self._ops = ops.load_ops()(self._launcher, units)
        return None

    def _find(self, what: str, config: WorkerConfig) -> Provider | Reason | None:
        """Who is to serve `what`; None: Triton."""
        name = config.options.get(self._wants[what], TRITON)
        return None if name == TRITON else find_provider(self._vendor.name, name, what)

    def queue(self) -> Queue:
        return self._queue

    def graphs(self) -> GraphCapture | None:
        # Libraries plan on the host, by the lengths of one step.
        if self.capabilities.step_mode != "capture" or (
            self._chosen_attention is not TritonAttention
        ):
            return None
        if self._is_interpreted:
            return ReplayedCalls()
        opens = self._vendor.open_copies
        where = (self.info.architecture, str(self.torch_device))
        return TorchGraphs(where[1], None if opens is None else partial(opens, *where))

    def make_staging(self, shape: Sequence[int], dtype: str) -> Tensor:
        pins = not self._is_interpreted
        with device_errors("staging"):
            return torch.empty(tuple(shape), dtype=getattr(torch, dtype), pin_memory=pins)

    def memory(self) -> MemoryInfo:
        if self._is_interpreted:
            return super().memory()
        with device_errors("memory"):
            module = torch.get_device_module(self.torch_device)
            free_bytes, total_bytes = module.mem_get_info(self.torch_device)
        return MemoryInfo(total_bytes=total_bytes, free_bytes=free_bytes)

    def synchronize(self) -> None:
        if not self._is_interpreted:
            with device_errors("step"):
                torch.get_device_module(self.torch_device).synchronize(self.torch_device)

    def measure_peak_bytes(self, work: Callable[[], None]) -> int:
        """By the allocator's own count: what it keeps between steps is not lost."""
        if self._is_interpreted:
            return super().measure_peak_bytes(work)
        module = torch.get_device_module(self.torch_device)
        module.synchronize()
        module.reset_peak_memory_stats(self.torch_device)
        before = module.memory_allocated(self.torch_device)
        taken = super().measure_peak_bytes(work)
        peak = module.max_memory_allocated(self.torch_device) - before
        return max(taken, int(peak))

    def communicator(self, ranks: Sequence[int], *, rank: int, address: str) -> Communicator:
        if len(ranks) == 1:
            return SoloCommunicator()
        from quire.backends.torch_accelerator.communicator import join_group

        return join_group(
            ranks,
            rank=rank,
            address=address,
            backend="gloo" if self._is_interpreted else self._vendor.collectives,
            torch_device=self.torch_device,
            limit=self.capabilities.max_tensor_parallel,
        )

    @property
    def tuner(self) -> Callable[..., str]:
        """What `quire tune` calls with a path, `is_dry` and `minutes`; it returns a sentence."""
        from quire.backends.torch_accelerator.tuning import tune_device

        units = self._vendor.architecture(self.info.architecture).fp8_units
        return partial(tune_device, self, self._launcher.table, fp8_units=units)

    def close(self) -> None:
        """Gives what torch's allocator keeps back to the driver; a lost device takes nothing."""
        if self._is_interpreted:
            return
        with suppress(DeviceLost), device_errors("cache"):
            torch.get_device_module(self.torch_device).empty_cache()


def _claims(vendor: Vendor, info: DeviceInfo, num_devices: int) -> Capabilities:
    """By architecture.

    Sums run in a fixed order (no float atomics), so a run can be repeated; vendors' matrix
    libraries choose by the size of a batch, so more is not claimed.
    """
    architecture = vendor.architecture(info.architecture)
    halves = _HALVES if architecture.has_bfloat16 else _HALVES[1:]
    dtypes = (*halves, _WIDE)
    return Capabilities(
        dtypes=dtypes,
        cache_dtypes=(*dtypes, *architecture.fp8, "int8"),
        block_sizes=_BLOCK_SIZES,
        attention_kinds=frozenset({"causal", "sliding_window", "chunked", "mla"}),
        features=_FEATURES,
        quantizations=_QUANTIZATIONS,
        attention_features=frozenset({"soft_cap", "sinks", "alibi"}),
        step_mode="capture" if architecture.has_graphs else "eager",
        is_asynchronous=True,
        copy_mode="asynchronous",
        determinism="run_to_run",
        max_tensor_parallel=num_devices,
    )


def _interpreted_claims(vendor: Vendor, info: DeviceInfo) -> Capabilities:
    """The vendor's claims but for what only a device has: a queue of its own and several devices.

    Recording is claimed, so that steps that are replayed run through the same kernels and plans.
    """
    claims = _claims(vendor, info, 1)
    return Capabilities(
        dtypes=(_WIDE, *_HALVES),
        cache_dtypes=(_WIDE, *_HALVES, *vendor.architecture(info.architecture).fp8, "int8"),
        block_sizes=claims.block_sizes,
        attention_kinds=claims.attention_kinds,
        features=claims.features,
        quantizations=claims.quantizations,
        attention_features=claims.attention_features,
        step_mode="capture",
        copy_mode="synchronous",
        determinism=claims.determinism,
        max_tensor_parallel=1,
    )
