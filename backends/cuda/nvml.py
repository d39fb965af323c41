"""NVIDIA's devices by NVML, the driver's management library, which makes no CUDA context.

Source: NVML API reference, device queries and error codes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quire.backends.torch_accelerator.environment import visible
from quire.backends.torch_accelerator.vendor import Found
from quire.core.interface import DeviceInfo

_LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96
_PROC = Path("/proc/driver/nvidia/version")
_NO_DRIVER = "install NVIDIA's driver; in a container, start it with the devices (--gpus all)"
_DRIVER_MISMATCH = 18
_REMEDIES = {
    9: "load the driver's kernel module (nvidia-smi says what it misses)",
    15: "a device has fallen off the bus: reset it or restart the machine",
    _DRIVER_MISMATCH: "library and kernel module differ in version: restart the machine",
}


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class NvmlError(Exception):
    """A call into NVML that failed."""

    def __init__(self, function: str, status: int) -> None:
        self.status = status
        super().__init__(f"{function} gave error {status}")


class Nvml:
    """The library's calls that are needed here."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, function: str, *arguments: Any) -> None:
        """Raises: NvmlError for any status but success."""
        status = getattr(self._library, function)(*arguments)
        if status:
            raise NvmlError(function, status)

    def text(self, function: str, *arguments: Any) -> str:
        """A call that fills in a string."""
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        self.call(function, *arguments, buffer, ctypes.c_uint(_TEXT_BYTES))
        return buffer.value.decode("utf-8", "replace")

    def number(self, function: str, *arguments: Any) -> int:
        """A call that fills in an int."""
        value = ctypes.c_int()
        self.call(function, *arguments, ctypes.byref(value))
        return value.value

    @contextmanager
    def session(self) -> Iterator[None]:
        """Between NVML's init and shutdown."""
        self.call("nvmlInit_v2")
        try:
            yield
        finally:
            self._library.nvmlShutdown()


def find_devices(library: Any = None) -> Found:
    """The devices that CUDA would see. `library` stands in for NVML in tests."""
    try:
        nvml = Nvml(ctypes.CDLL(_LIBRARY) if library is None else library)
    except OSError:
        hint = _read_proc()
        problem = "no NVIDIA driver was found" + (f", though {_PROC} says {hint}" if hint else "")
        return Found(problem=problem, remedy=_NO_DRIVER)
    try:
        with nvml.session():
            return _query(nvml)
    except NvmlError as error:
        return Found(
            problem=f"NVIDIA's driver does not answer: {error}",
            remedy=_REMEDIES.get(error.status, "see what nvidia-smi says"),
        )


def _query(nvml: Nvml) -> Found:
    driver = nvml.text("nvmlSystemGetDriverVersion")
    number = nvml.number("nvmlSystemGetCudaDriverVersion_v2")
    runtime = (number // 1000, number % 1000 // 10)
    count = nvml.number("nvmlDeviceGetCount_v2")
    details = {"driver": driver, "cuda": f"{runtime[0]}.{runtime[1]}"}
    every = [_describe(nvml, index, details) for index in range(count)]
    chosen = visible(every, "CUDA_VISIBLE_DEVICES")
    if not chosen:
        why = "CUDA_VISIBLE_DEVICES hides all devices" if every else "the driver sees no device"
        return Found(problem=why, remedy="check nvidia-smi -L and CUDA_VISIBLE_DEVICES")
    devices = tuple(_numbered(info, index) for index, info in enumerate(chosen))
    return Found(devices=devices, runtime=runtime)


def _describe(nvml: Nvml, index: int, details: dict[str, str]) -> tuple[str, DeviceInfo]:
    handle = ctypes.c_void_p()
    nvml.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    major, minor = ctypes.c_int(), ctypes.c_int()
    capability = (ctypes.byref(major), ctypes.byref(minor))
    nvml.call("nvmlDeviceGetCudaComputeCapability", handle, *capability)
    memory = _Memory()
    nvml.call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
    name = nvml.text("nvmlDeviceGetName", handle).removeprefix("NVIDIA ")
    unique = nvml.text("nvmlDeviceGetUUID", handle)
    info = DeviceInfo(
        index=index,
        name=name,
        architecture=f"sm_{major.value}{minor.value}",
        total_memory_bytes=memory.total,
        details={**details, "uuid": unique},
    )
    return unique, info


def _numbered(info: DeviceInfo, index: int) -> DeviceInfo:
    from dataclasses import replace

    return replace(info, index=index)


def _read_proc() -> str:
    try:
        return _PROC.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return ""
