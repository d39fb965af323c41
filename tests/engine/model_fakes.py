"""Engines on tiny models, without asking which backends are installed."""

from __future__ import annotations

from pathlib import Path

from quire.core.config import EngineConfig
from quire.core.discovery import ChosenDevice
from quire.core.engine.core import EngineCore, StartTimer, start_core
from quire.core.interface import Backend
from quire.core.planning import PlannedEngine, make_plan


def build_cpu_core(config: EngineConfig) -> EngineCore:
    """As `EngineCore.build` with device cpu."""
    from quire.backends.cpu import CpuBackend

    return _build(config, CpuBackend())


def build_sim_core(config: EngineConfig) -> EngineCore:
    """As `EngineCore.build` with device sim: asynchronous, so that steps overlap."""
    from quire.backends.sim import SimBackend

    return _build(config, SimBackend())


def _build(config: EngineConfig, backend: Backend) -> EngineCore:
    import torch

    torch.set_num_threads(1)
    device = backend.open(0)
    chosen = ChosenDevice(
        name=backend.name, backend=backend, index=0, info=device.info, why="a test", considered=()
    )
    plan, description = make_plan(config, Path(config.model), chosen, device)
    planned = PlannedEngine(plan=plan, device=device, description=description)
    return start_core(planned, StartTimer())
