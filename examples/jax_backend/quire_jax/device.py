"""An opened device of XLA: what it claims, what memory it has, and the worker that it brings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from quire.core.interface import (
    Capabilities,
    CheckpointError,
    Device,
    DeviceError,
    DeviceInfo,
    DeviceLost,
    MemoryInfo,
    Reason,
    UnsupportedError,
    Worker,
    WorkerConfig,
)
from quire_jax.decoder import read_decoder

if TYPE_CHECKING:
    from quire.core.interface import AttentionBackend, AttentionSpec, Ops

TOKEN_BUCKETS = (64, 512, 2048, 8192)
REQUEST_BUCKETS = (8, 64, 256)
_DTYPES = ("float32", "bfloat16")
COMPILATION_CACHE = "jax.compilation_cache"
"""The option that names a folder in which XLA keeps what it compiled, for the next start."""


def open_device(info: DeviceInfo) -> JaxDevice:
    """Starts the runtime of the platform that `info` was found on.

    Raises: DeviceError if it does not start.
    """
    try:
        device = jax.devices(info.architecture)[info.index]
    except (RuntimeError, IndexError) as error:
        raise DeviceError(
            f"jax:{info.index} ({info.name}) cannot be opened: {error}; check JAX_PLATFORMS and "
            "that no other process holds the device"
        ) from error
    return JaxDevice(info, device)


class JaxDevice(Device):
    """Runs whole models, compiled by XLA. Knows no torch, so it has no operators to offer."""

    torch_device = None
    option_names = (COMPILATION_CACHE,)

    def __init__(self, info: DeviceInfo, device: jax.Device) -> None:
        self._device = device
        self.info = replace(info, details={"jax": jax.__version__, "kind": device.device_kind})
        self.capabilities = Capabilities(
            dtypes=_DTYPES,
            cache_dtypes=_DTYPES,
            block_sizes=(16, 32),
            attention_kinds=frozenset({"causal", "sliding_window"}),
            attention_features=frozenset({"soft_cap"}),
            token_buckets=TOKEN_BUCKETS,
            request_buckets=REQUEST_BUCKETS,
            step_mode="compile",
            # A shape is compiled once and runs the same way again; another shape rounds otherwise.
            determinism="run_to_run",
        )

    def memory(self) -> MemoryInfo:
        """As the runtime says it; of the host, where it counts none."""
        try:
            counted = self._device.memory_stats()
        except jax.errors.JaxRuntimeError as error:
            raise DeviceLost(f"{self.info.name} no longer answers: {error}") from error
        if not counted:
            return _host_memory()
        total = int(counted["bytes_limit"])
        return MemoryInfo(total_bytes=total, free_bytes=max(0, total - counted["bytes_in_use"]))

    def ops(self) -> Ops:
        """Not offered: XLA compiles whole steps."""
        raise UnsupportedError([_no_tensors("operators")], what="torch's operators on XLA")

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        """Not offered: XLA compiles whole steps."""
        raise UnsupportedError([_no_tensors("attention")], what="torch's attention on XLA")

    def reasons_against(self, worker_config: WorkerConfig) -> Sequence[Reason]:
        """What of a configuration or of its model this package cannot run."""
        reasons = []
        if worker_config.logits_processors:
            reasons.append(
                Reason(
                    code="jax.logits_processors",
                    need="logits processors of the user's",
                    have="sampling that XLA compiled",
                    remedy="leave them out, or use a device that torch knows",
                )
            )
        if worker_config.world_size != 1:
            reasons.append(
                Reason(
                    code="jax.world_size",
                    need=f"a model over {worker_config.world_size} devices",
                    have="one device",
                    remedy="run on one device",
                )
            )
        return [*reasons, *_model_reasons(Path(worker_config.model))]

    def make_worker(self, config: WorkerConfig) -> Worker:
        """The worker of this device.

        Raises: UnsupportedError with every reason.
        """
        from quire_jax.worker import JaxWorker

        reasons = self.reasons_against(config)
        if reasons:
            raise UnsupportedError(reasons, what=f"a worker on {self.info.name}")
        if COMPILATION_CACHE in config.options:
            _keep_compiled(Path(config.options[COMPILATION_CACHE]))
        return JaxWorker(self, self._device, config)


def _model_reasons(directory: Path) -> Sequence[Reason]:
    if not (directory / "config.json").is_file():
        return ()  # loading says what is wrong with it
    try:
        read_decoder(directory)
    except UnsupportedError as error:
        return error.reasons
    except CheckpointError:
        return ()
    return ()


def _keep_compiled(folder: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _host_memory() -> MemoryInfo:
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (page * os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":  # what the page cache holds can be had, too
                free = int(rest.split()[0]) * 1024
    except OSError:
        pass
    return MemoryInfo(total_bytes=total, free_bytes=min(free, total))


def _no_tensors(what: str) -> Reason:
    return Reason(
        code="jax.torch",
        need=f"{what} on torch's tensors",
        have="whole models in XLA",
        remedy="run the model through this device's worker",
    )
