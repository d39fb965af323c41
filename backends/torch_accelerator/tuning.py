"""`quire tune` on an accelerator: the timer, and where the numbers come from."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from quire.backends.reference import TorchDevice
from quire.core.interface import DeviceError
from quire.kernels_triton import tuning
from quire.kernels_triton.launch import LaunchTable
from quire.kernels_triton.tuning_work import works

_ROUNDS, _DRY_ROUNDS, _DRY_CANDIDATES = 10, 1, 2
_ROUND_S = 2e-3
"""A round repeats what takes less, so that waiting for the device is no part of the figure."""
_MOST_CALLS = 100


def tune_device(
    device: TorchDevice,
    table: LaunchTable,
    path: Path,
    *,
    is_dry: bool,
    minutes: float = 8.0,
    fp8_units: str = "",
    clock: Callable[[], float] = time.monotonic,
) -> str:
    """Writes a tuned table to `path` and its trials beside it; returns a sentence about them.

    What has not begun after `minutes` is left as it was and named. `fp8_units`: the 8-bit float
    that the device's matrix units multiply; empty: none.

    Raises: DeviceError where the interpreter is asked for figures.
    """
    is_interpreted = str(device.torch_device) == "cpu"
    if is_interpreted and not is_dry:
        raise DeviceError(
            f"{device.info.name} was asked to be tuned; interpreted kernels have no speed: run on "
            "a device, or with --dry-run"
        )
    end = clock() + 60.0 * minutes
    found = tuning.tune(
        table,
        works(str(device.torch_device), is_dry=is_dry, fp8_units=fp8_units),
        partial(_measure, device, _DRY_ROUNDS if is_dry else _ROUNDS),
        limit=_DRY_CANDIDATES if is_dry else 0,
        is_over=lambda: clock() > end,
    )
    tuning.write_table(found, path, _provenance(device, is_dry=is_dry))
    failed = sum(trial.seconds is None for trial in found.trials)
    left = f"; left as they were: {', '.join(found.untried)}" if found.untried else ""
    return f"{len(found.trials)} candidates tried, {failed} could not run; written to {path}{left}"


def _provenance(device: TorchDevice, *, is_dry: bool) -> dict[str, str]:
    method = f"each number of a row in turn; median of {_ROUNDS} rounds, the shapes by their shares"
    return {
        "method": "dry run: the figures mean nothing" if is_dry else method,
        "device": device.info.name,
        "triton": version("triton"),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _measure(device: TorchDevice, num_rounds: int, work: Callable[[], None]) -> list[float]:
    """Seconds of a call, round by round; the first call compiles."""
    work()
    once = _seconds_of(device, work, 1)
    calls = max(1, min(_MOST_CALLS, int(_ROUND_S / max(once, 1e-9)))) if num_rounds > 1 else 1
    return [_seconds_of(device, work, calls) for _ in range(num_rounds)]


def _seconds_of(device: TorchDevice, work: Callable[[], None], calls: int) -> float:
    device.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    device.synchronize()
    return (time.perf_counter() - begin) / calls
