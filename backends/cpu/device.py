"""One opened CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from quire import kernels_cpu
from quire.backends.cpu import linear
from quire.backends.cpu.attention import CpuAttention
from quire.backends.cpu.host import count_cores, list_cores, read_cpu, read_memory
from quire.backends.cpu.ops import CpuOps
from quire.backends.reference import ReferenceAttention, TorchDevice
from quire.backends.reference.cache_codec import NARROW
from quire.core.interface import (
    AttentionSpec,
    Capabilities,
    DeviceInfo,
    MemoryInfo,
    Ops,
    Reason,
    Worker,
    WorkerConfig,
)

_NUM_THREADS = "cpu.num_threads"
_ISA = "cpu.isa"
_PIN = "cpu.pin_threads"
_SWITCH = ("0", "1")
_MAX_TENSOR_PARALLEL = 8
"""Processes that may share one machine's cores; more would wait for each other alone."""
_BLOCK_SIZES = (16, 32, 64, 128, 8, 4, 2, 1)


class CpuDevice(TorchDevice):
    """All cores that the process may use, as one device; torch's threads are its only setting."""

    option_names = (_NUM_THREADS, _ISA, _PIN)

    def __init__(self, info: DeviceInfo, *, has_bound_threads: bool = False) -> None:
        super().__init__(info=info, torch_device="cpu", capabilities=_capabilities())
        # Fewer if the user said so (OMP_NUM_THREADS), never more than there are cores: a thread
        # too many makes every parallel region wait for its turn.
        # A bound main thread shows one CPU as usable: then the user's number stands.
        if not has_bound_threads:
            torch.set_num_threads(min(torch.get_num_threads(), count_cores()))

    def _make_ops(self) -> Ops:
        return CpuOps()

    def _attention_class(self, spec: AttentionSpec) -> type[ReferenceAttention]:
        return CpuAttention

    def memory(self) -> MemoryInfo:
        return read_memory()

    def reasons_against(self, worker_config: WorkerConfig) -> Sequence[Reason]:
        reasons = (_thread_reasons, _pin_reasons, _isa_reasons, _cache_reasons)
        return [reason for find in reasons for reason in find(worker_config)]

    def make_worker(self, config: WorkerConfig) -> Worker | None:
        """Sets threads and ISA level, and leaves the work to the core's worker."""
        if _ISA in config.options:
            kernels_cpu.use_isa(config.options[_ISA])
        num_threads = _asked_threads(config)
        if num_threads is not None:
            torch.set_num_threads(int(num_threads))
        if config.options.get(_PIN) == "1":
            kernels_cpu.pin_threads(list_cores())
        if config.deterministic:
            self._ops = CpuOps(is_deterministic=True)
        return None


def _asked_threads(worker_config: WorkerConfig) -> str | None:
    """The number that was asked for, if one was: the device's own option before the engine's."""
    of_engine = worker_config.num_threads
    return worker_config.options.get(_NUM_THREADS, None if of_engine is None else str(of_engine))


def _thread_reasons(worker_config: WorkerConfig) -> Iterator[Reason]:
    text = _asked_threads(worker_config)
    if text is not None and not (text.isdecimal() and int(text) > 0):
        yield Reason(
            code="options.cpu.num_threads",
            need=f"{text!r} threads",
            have=f"{count_cores()} cores",
            remedy=f"give {_NUM_THREADS} a whole number from 1 to {count_cores()}",
        )


def _pin_reasons(worker_config: WorkerConfig) -> Iterator[Reason]:
    text = worker_config.options.get(_PIN, "0")
    if text not in _SWITCH:
        have, remedy = "the switches 0 and 1", f"give {_PIN} 0 or 1"
    elif text == "1" and not kernels_cpu.HAVE_NATIVE:
        have, remedy = str(kernels_cpu.WHY_NOT_NATIVE), f"leave {_PIN} out"
    else:
        return
    yield Reason(
        code="options.cpu.pin_threads", need=f"pinned threads: {text!r}", have=have, remedy=remedy
    )


def _isa_reasons(worker_config: WorkerConfig) -> Iterator[Reason]:
    level = worker_config.options.get(_ISA)
    levels = kernels_cpu.available_isas() if kernels_cpu.HAVE_NATIVE else []
    if level is not None and level not in levels:
        yield Reason(
            code="options.cpu.isa",
            need=f"the ISA level {level!r}",
            have=", ".join(levels) or str(kernels_cpu.WHY_NOT_NATIVE),
            remedy=f"give {_ISA} a level that this machine has, or leave it out",
        )


def _cache_reasons(worker_config: WorkerConfig) -> Iterator[Reason]:
    """A cache of another dtype is read by plain torch, whose sums depend on the batch."""
    if worker_config.deterministic and worker_config.cache_dtype != worker_config.dtype:
        yield Reason(
            code="config.deterministic",
            need=f"logits that depend on no batch, with a cache of {worker_config.cache_dtype}",
            have=f"that promise for a cache of {worker_config.dtype}, as dtype",
            remedy="leave cache_dtype or deterministic out",
        )


def _capabilities() -> Capabilities:
    """What a CPU can do: everything that the reference can. Speed decides which dtype is first."""
    wide, half = "float32", "bfloat16"
    is_invariant = kernels_cpu.HAVE_NATIVE and linear.is_batch_invariant()
    dtypes = (half, wide, "float16") if read_cpu().has_bfloat16 else (wide, half, "float16")
    return Capabilities(
        dtypes=dtypes,
        cache_dtypes=(*dtypes, *NARROW),
        block_sizes=_BLOCK_SIZES,
        attention_kinds=frozenset({"causal", "sliding_window", "chunked", "mla"}),
        features=frozenset(
            {
                "lora",
                "moe",
                "quantized_experts",
                "recurrent",
                "speculation",
                "state_slots",
                "cache_rows",
            }
        ),
        attention_features=frozenset({"soft_cap", "sinks", "alibi"}),
        quantizations=frozenset({"int8", "int4"}),
        copy_mode="unified",
        max_tensor_parallel=_MAX_TENSOR_PARALLEL,
        # The kernel's promise and oneDNN's habit, which is tried here and for every shape at load.
        determinism="invariant" if is_invariant else "run_to_run",
    )
