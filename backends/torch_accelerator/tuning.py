"""`quire tune` on an accelerator: the timer, and where the numbers come from."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from quire.backends.reference import TorchDevice
from quire.core.interface import DeviceError
from quire.kernels_triton import tuning
from quire.kernels_triton.launch import LaunchTable

_ROUNDS, _DRY_ROUNDS, _DRY_CANDIDATES = 20, 1, 2


def tune_device(device: TorchDevice, table: LaunchTable, path: Path, *, is_dry: bool) -> str:
    """Writes a tuned table to `path` and its trials beside it; returns a sentence about them.

    Raises: DeviceError where the interpreter is asked for figures.
    """
    is_interpreted = str(device.torch_device) == "cpu"
    if is_interpreted and not is_dry:
        raise DeviceError(
            f"{device.info.name} was asked to be tuned; interpreted kernels have no speed: run on "
            "a device, or with --dry-run"
        )

    def measure(work: Callable[[], None]) -> list[float]:
        work()
        return [_seconds_of(device, work) for _ in range(_DRY_ROUNDS if is_dry else _ROUNDS)]

    limit = _DRY_CANDIDATES if is_dry else 0
    tuned, trials = tuning.tune(
        table, str(device.torch_device), measure, is_dry=is_dry, limit=limit
    )
    provenance = {
        "method": "dry run: the figures mean nothing" if is_dry else f"median of {_ROUNDS} runs",
        "device": device.info.name,
        "triton": version("triton"),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    tuning.write_table(tuned, trials, path, provenance)
    failed = sum(trial.seconds is None for trial in trials)
    return f"{len(trials)} candidates tried, {failed} could not run; written to {path}"


def _seconds_of(device: TorchDevice, work: Callable[[], None]) -> float:
    device.synchronize()
    begin = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - begin
