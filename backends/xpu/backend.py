"""The factory of XPU devices."""

from __future__ import annotations

from pathlib import Path

from quire.backends.torch_accelerator import AcceleratorBackend, Found, Vendor
from quire.backends.torch_accelerator.vendor import Architecture
from quire.backends.xpu.drm import find_devices


def _no_table(architecture: str) -> Path | None:  # noqa: ARG001 - as the others answer
    """Nobody has tuned for these devices yet: the portable table serves them all."""
    return None


XPU = Vendor(
    name="xpu",
    title="XPU",
    torch_type="xpu",
    collectives="xccl",
    build_field="xpu",
    torch_index="https://download.pytorch.org/whl/xpu",
    driver_remedy="install or update Intel's GPU driver and Level Zero",
    architectures={"xe": Architecture()},
    read_tables=_no_table,
    interpreted_architecture="xe",
)


class XpuBackend(AcceleratorBackend):
    """Intel's devices on this machine."""

    name = "xpu"
    interface_version = "1.1"
    _vendor = XPU

    def _find(self) -> Found:
        return find_devices()
