"""Engines on tiny models, without asking which backends are installed."""

from __future__ import annotations

from pathlib import Path

from quire.core.config import EngineConfig
from quire.core.discovery import ChosenDevice
from quire.core.engine.core import EngineCore, StartTimer, start_core
from quire.core.planning import PlannedEngine, make_plan


def build_cpu_core(config: EngineConfig) -> EngineCore:
    """As `EngineCore.build` with device cpu."""
    import torch

    from quire.backends.cpu import CpuBackend

    torch.set_num_threads(1)
    backend = CpuBackend()
    device = backend.open(0)
    chosen = ChosenDevice(
        name="cpu", backend=backend, index=0, info=device.info, why="a test", considered=()
    )
    plan, description = make_plan(config, Path(config.model), chosen, device)
    return start_core(
        PlannedEngine(plan=plan, device=device, description=description), StartTimer()
    )
