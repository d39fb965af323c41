"""A machine with an accelerator, as far as the backends of CUDA, ROCm and XPU see one.

What a driver and a build of torch say is made up; memory is the host's; kernels are the reference.
All between is real: the probe, the opening, the queue, the recordings and the engine above them.
What goes wrong, and when, is said by `Fault`.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from quire.backends.cuda.backend import CUDA, CudaBackend
from quire.backends.reference import ReferenceAttention, ReferenceOps
from quire.backends.rocm.backend import ROCM, RocmBackend
from quire.backends.torch_accelerator import Found, TorchBuild
from quire.backends.torch_accelerator import backend as backend_module
from quire.backends.torch_accelerator import device as device_module
from quire.backends.torch_accelerator.graphs import TorchGraphs
from quire.backends.torch_accelerator.vendor import Architecture
from quire.backends.xpu.backend import XPU, XpuBackend
from quire.core.interface import DeviceInfo

_ADVICE = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect.\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)
"""What torch ends every error of CUDA with, and of HIP in its own words."""
_CAPTURED_BEFORE = "operation failed due to a previous error during capture"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One vendor: its backend, and how its stack speaks."""

    backend: type
    vendor: Any
    device: DeviceInfo
    build: dict[str, str]
    """Of a build of torch that fits."""
    runtime: tuple[int, int] | None = None
    """That the driver serves, where it says so."""
    graph: str = "CUDAGraph"
    """torch's class of graphs; empty: this version of torch records nothing on the device."""
    no_driver: Exception = field(default_factory=RuntimeError)
    """What torch says where the driver is too old for it."""
    refused: Exception = field(default_factory=RuntimeError)
    """What an allocation that does not fit says."""
    lost: Exception = field(default_factory=RuntimeError)
    """What everything says once the device is gone."""

    def error(self, text: str) -> Exception:
        """An error of the driver's as torch tells it."""
        kind = RuntimeError if self.vendor is XPU else torch.AcceleratorError
        return kind(f"{self.vendor.title.replace('ROCm', 'HIP')} error: {text}{_ADVICE}")


KINDS = {
    "cuda": Kind(
        backend=CudaBackend,
        vendor=CUDA,
        device=DeviceInfo(index=0, name="H200", architecture="sm_90"),
        build={"__version__": "2.11.0+cu128", "cuda": "12.8"},
        runtime=(12, 8),
        no_driver=RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update"
        ),
        refused=torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139 GiB"
        ),
        lost=torch.AcceleratorError("CUDA error: unspecified launch failure" + _ADVICE),
    ),
    "rocm": Kind(
        backend=RocmBackend,
        vendor=ROCM,
        device=DeviceInfo(index=0, name="MI300X", architecture="gfx942"),
        build={"__version__": "2.11.0+rocm6.4", "hip": "6.4.43482"},
        no_driver=RuntimeError("No HIP GPUs are available"),
        refused=torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
        lost=torch.AcceleratorError("HIP error: unspecified launch failure" + _ADVICE),
    ),
    "xpu": Kind(
        backend=XpuBackend,
        vendor=XPU,
        device=DeviceInfo(index=0, name="Intel Arc B-Series", architecture="xe2_hpg"),
        build={"__version__": "2.11.0+xpu", "xpu": "20250301"},
        graph="XPUGraph",
        no_driver=RuntimeError("No XPU devices are available."),
        refused=RuntimeError(
            "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
        ),
        lost=RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    ),
}
KINDS["xpu, torch without graphs"] = replace(KINDS["xpu"], graph="")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong. Nothing, unless said."""

    no_driver: bool = False
    """torch finds the driver too old when the device is opened."""
    without_code: bool = False
    """torch's build has no code for the device."""
    memory_bytes: int = 1 << 40
    """What can be allocated in all; the driver says that there is more."""
    lost_at_launch: int = 0
    """The launch, counted from 1, at which the device falls off the bus."""
    refused_at_capture: bool = False
    """Memory is refused to whatever is recorded."""
    lost_at_capture: bool = False


class Machine:
    """What `torch.get_device_module` gives, and what its driver does."""

    def __init__(self, kind: Kind, fault: Fault) -> None:
        self.kind, self.fault = kind, fault
        self.num_asked = self.num_launches = self.num_events = self.taken_bytes = 0
        self.pinned: list[torch.Tensor] = []
        self.log: list[str] = []
        """Copies as they are queued, and events as they are recorded and awaited: `record 3`."""
        self.num_graphs, self.num_replays = 0, 0
        self.is_lost = self.is_capturing = self.has_failed_capture = False
        self.recorded: Any = None
        if kind.graph:
            setattr(self, kind.graph, lambda: _Graph(self))

    def ask(self) -> None:
        """Everything goes to the driver, which tells of what happened before."""
        self.num_asked += 1
        if self.is_lost:
            raise self.kind.lost

    def open(self) -> None:
        """The first thing that a process asks for."""
        self.ask()
        if self.fault.no_driver:
            raise self.kind.no_driver
        if self.fault.without_code:
            raise self.kind.error("no kernel image is available for execution on the device")

    def allocate(self, num_bytes: int) -> None:
        """Takes memory for good."""
        self.ask()
        self.taken_bytes += num_bytes
        if self.taken_bytes > self.fault.memory_bytes:
            self.taken_bytes -= num_bytes
            raise self.kind.refused

    def launch(self) -> None:
        """A kernel; what becomes of it is told by whoever waits for it, or launches the next."""
        self.ask()
        self.num_launches += 1
        if self.is_capturing and self.fault.refused_at_capture:
            self.has_failed_capture = True
            raise self.kind.refused
        if self.is_capturing and self.fault.lost_at_capture:
            self.is_lost = True
            raise self.kind.lost
        self.is_lost = self.num_launches == self.fault.lost_at_launch

    # --- torch.cuda, torch.xpu ------------------------------------------------------------------

    def Event(self) -> _Event:
        return _Event(self)

    def Stream(self, device: object = None) -> _Stream:
        return _Stream(self)

    def current_stream(self, device: object = None) -> _Stream:
        return _Stream(self)

    @contextmanager
    def stream(self, stream: object):
        yield

    @contextmanager
    def device(self, device: object):
        yield

    def set_device(self, device: object) -> None:
        self.ask()

    def synchronize(self, device: object = None) -> None:
        self.ask()

    def empty_cache(self) -> None:
        self.ask()

    def reset_peak_memory_stats(self, device: object = None) -> None:
        self.ask()

    def memory_allocated(self, device: object = None) -> int:
        return 0

    def max_memory_allocated(self, device: object = None) -> int:
        return 1 << 20

    def mem_get_info(self, device: object = None) -> tuple[int, int]:
        self.ask()
        return 100 << 30, 139 << 30


class _Stream:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def wait_stream(self, other: object) -> None:
        self._machine.ask()

    def synchronize(self) -> None:
        self._machine.ask()


class _Event:
    def __init__(self, machine: Machine) -> None:
        self._machine, self._number = machine, 0

    def record(self, stream: object) -> None:
        self._machine.ask()
        self._machine.num_events += 1
        self._number = self._machine.num_events
        self._machine.log.append(f"record {self._number}")

    def query(self) -> bool:
        self._machine.ask()
        return True

    def synchronize(self) -> None:
        self._machine.ask()
        self._machine.log.append(f"wait {self._number}")


class _Graph:
    """Knows the step that it recorded, which no real one does, to run it again."""

    def __init__(self, machine: Machine) -> None:
        self._machine, self._step = machine, None

    def capture_begin(self, pool: object = None) -> None:
        self._machine.ask()
        self._machine.is_capturing, self._machine.has_failed_capture = True, False

    def capture_end(self) -> None:
        self._machine.is_capturing = False
        self._machine.ask()
        if self._machine.has_failed_capture:
            raise self._machine.kind.error(_CAPTURED_BEFORE)
        self._step = self._machine.recorded
        self._machine.num_graphs += 1

    def replay(self) -> None:
        self._machine.ask()
        self._machine.num_replays += 1
        with torch.inference_mode():
            self._step()

    def reset(self) -> None:
        self._step = None

    def pool(self) -> str:
        return "the pool"


class _Attention(ReferenceAttention):
    """Takes lengths from the device's tensors alone, as recorded work must."""

    def __init__(self, spec, torch_device, launcher) -> None:
        super().__init__(spec, torch_device)

    def provider(self) -> str:
        return "stand-in"

    def plan(self, batch):
        seq_lens, starts = batch.seq_lens.tolist(), batch.query_start_loc.tolist()
        return super().plan(replace(batch, seq_lens_host=seq_lens, query_start_loc_host=starts))


def _ops(machine: Machine) -> type[ReferenceOps]:
    class Ops(ReferenceOps):
        def __init__(self, launcher, units) -> None:
            super().__init__()

        def rms_norm(self, x, weight, eps):
            machine.launch()
            return super().rms_norm(x, weight, eps)

    return Ops


class StandIn:
    """A machine with one device of `name`, while it is installed in this process."""

    def __init__(
        self,
        name: str,
        *,
        build: dict[str, str] | None = None,
        runtime: tuple[int, int] | None = None,
        found: Found | None = None,
        **faults: Any,
    ) -> None:
        """`build`, `runtime`, `found`: of torch, driver and probe, where they do not fit."""
        self.kind = KINDS[name]
        self.machine = Machine(self.kind, Fault(**faults))
        self._build = TorchBuild(fields=self.kind.build if build is None else build)
        self._found = found or Found(
            devices=(self.kind.device,), runtime=tuple(runtime) if runtime else self.kind.runtime
        )
        self._stack = ExitStack()

    def __enter__(self) -> Machine:
        self.install()
        return self.machine

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def install(self) -> None:
        """Puts it in the place of torch's device module, its allocations, and the probe."""
        # A device of torch's that exists: the host's, under a name that the backends take for theirs.
        vendor = replace(
            self.kind.vendor,
            torch_type="cpu",
            open_copies=None,
            architectures={**self.kind.vendor.architectures},
        )
        for target, name, value in (
            (self.kind.backend, "_vendor", vendor),
            (self.kind.backend, "_find", lambda backend: self._found),
            (backend_module, "read_torch_build", lambda: self._build),
            (device_module, "TritonOps", _ops(self.machine)),
            (device_module, "TritonAttention", _Attention),
            (torch, "get_device_module", lambda device=None: self.machine),
            (torch, "zeros", self._opening(torch.zeros)),
            (torch, "empty", self._allocating(torch.empty)),
            (torch.Tensor, "copy_", self._copying(torch.Tensor.copy_)),
            (torch.Tensor, "to", self._moving(torch.Tensor.to)),
            (TorchGraphs, "capture", self._recording(TorchGraphs.capture)),
        ):
            self._stack.enter_context(patch.object(target, name, value))

    def _opening(self, real: Any) -> Any:
        allocate = self._allocating(real)

        def zeros(*shape: Any, **named: Any) -> Any:
            if named.get("device") == "cpu:0":
                self.machine.open()
            return allocate(*shape, **named)

        return zeros

    def _allocating(self, real: Any) -> Any:
        def make(*shape: Any, **named: Any) -> Any:
            is_pinned = named.pop("pin_memory", False)
            made = real(*shape, **named)
            if is_pinned:
                self.machine.pinned.append(made)
            if named.get("device") == "cpu:0":
                self.machine.allocate(made.nbytes)
            return made

        return make

    def _copying(self, real: Any) -> Any:
        def copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
            if non_blocking:
                places = {tensor.untyped_storage().data_ptr() for tensor in self.machine.pinned}
                ends = [t.untyped_storage().data_ptr() in places for t in (source, target)]
                self.machine.log.append(f"copy, {sum(ends)} end pinned")
            return real(target, source)

        return copy

    def _moving(self, real: Any) -> Any:
        def to(tensor: Any, *where: Any, **named: Any) -> Any:
            moved = real(tensor, *where, **named)
            if "cpu:0" in where:
                self.machine.allocate(moved.nbytes)
            return moved

        return to

    def _recording(self, real: Any) -> Any:
        def capture(graphs: TorchGraphs, key: str, step: Any) -> Any:
            self.machine.recorded = step
            return real(graphs, key, step)

        return capture


__all__ = ["KINDS", "Architecture", "Fault", "Machine", "StandIn"]
