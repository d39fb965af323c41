"""The factory of CPU devices. Imports no torch before a device is opened."""

from __future__ import annotations

import os
from importlib.util import find_spec

from quire.backends.cpu.host import count_cores, read_cpu, read_memory
from quire.backends.cpu.openmp import binds_threads, prefer_short_waits
from quire.core.interface import Backend, Device, DeviceError, DeviceInfo, Probe

_NO_TORCH = "torch is not installed"
_INSTALL_TORCH = 'pip install "quire[cpu]"'
_INSTALL_NATIVE = "install a C++ compiler, then reinstall quire from source: pip install ."


class CpuBackend(Backend):
    """The CPUs of this machine, as one device."""

    name = "cpu"
    interface_version = "1.1"

    def probe(self) -> Probe:
        if find_spec("torch") is None:
            return Probe(problem=_NO_TORCH, remedy=_INSTALL_TORCH)
        prefer_short_waits(os.environ)
        from quire import kernels_cpu

        devices = (_device_info(),)
        if kernels_cpu.HAVE_NATIVE:
            return Probe(devices=devices)
        problem = f"slower than it could be: {kernels_cpu.WHY_NOT_NATIVE}"
        return Probe(devices=devices, problem=problem, remedy=_INSTALL_NATIVE)

    def open(self, index: int) -> Device:
        if index != 0:
            raise DeviceError(
                f"cpu device {index} was asked for; there is one, number 0: use cpu:0"
            )
        if find_spec("torch") is None:
            raise DeviceError(f"the CPU cannot be opened: {_NO_TORCH}; {_INSTALL_TORCH}")
        prefer_short_waits(os.environ)
        from quire.backends.cpu.device import CpuDevice

        return CpuDevice(_device_info(), has_bound_threads=binds_threads(os.environ))


def _device_info() -> DeviceInfo:
    from quire import kernels_cpu

    cpu = read_cpu()
    kernels, levels = "reference", "none"
    if kernels_cpu.HAVE_NATIVE:
        kernels, levels = f"native:{kernels_cpu.isa()}", ", ".join(kernels_cpu.available_isas())
    return DeviceInfo(
        index=0,
        name=cpu.name,
        architecture=cpu.architecture,
        total_memory_bytes=read_memory().total_bytes,
        details={
            "cores": str(count_cores()),
            "bfloat16": "native" if cpu.has_bfloat16 else "emulated",
            "kernels": kernels,
            "levels": levels,
        },
    )
