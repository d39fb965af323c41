"""The factory of one vendor's devices. Imports no torch before a device is opened."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from dataclasses import replace

from quire.backends.torch_accelerator.environment import is_interpreting
from quire.backends.torch_accelerator.torch_build import (
    TorchBuild,
    problem_with_triton,
    read_torch_build,
)
from quire.backends.torch_accelerator.vendor import Found, Vendor
from quire.core.interface import Backend, Device, DeviceError, DeviceInfo, Probe

_PRIORITY = 100
_INTERPRETED_PRIORITY = -100
INTERPRETED = "interpreted by Triton on the CPU; right and very slow, for tests"


class AcceleratorBackend(Backend):
    """Devices of one `Vendor`, or Triton's interpreter in their place."""

    interface_version = "1.1"
    _vendor: Vendor

    @abstractmethod
    def _find(self) -> Found:
        """The vendor's devices on this machine, without a driver's context; never raises."""

    def probe(self) -> Probe:
        try:
            return self._probe(read_torch_build())
        except Exception as error:  # a probe never raises: a strange machine is a row in a table
            problem = f"probing failed: {type(error).__name__}: {error}"
            return Probe(problem=problem, remedy=self._vendor.driver_remedy)

    def _probe(self, build: TorchBuild) -> Probe:
        interprets = is_interpreting()
        found = Found(devices=(self._interpreted(),)) if interprets else self._find()
        if not found.devices:
            return Probe(problem=found.problem, remedy=found.remedy)
        problem, remedy = ("", "") if interprets else self._unfit(build, found)
        if not problem:
            problem, remedy = problem_with_triton()
        if not build.version:
            problem, remedy = "torch is not installed", self._vendor.install
        if problem:
            counts = Counter(device.name for device in found.devices)
            names = ", ".join(f"{n} x {name}" if n > 1 else name for name, n in counts.items())
            # The priority that it would have: who looks knows that something is left unused.
            return Probe(
                problem=f"{names}: {problem}",
                remedy=remedy,
                priority=_INTERPRETED_PRIORITY if interprets else _PRIORITY,
            )
        if interprets:
            return Probe(devices=found.devices, problem=INTERPRETED, priority=_INTERPRETED_PRIORITY)
        return Probe(devices=self._detailed(build, found), priority=_PRIORITY)

    def _unfit(self, build: TorchBuild, found: Found) -> tuple[str, str]:
        """(problem, remedy) where torch and the driver do not fit; empty where they do."""
        vendor = self._vendor
        wanted = build.runtime(vendor.build_field)
        if wanted is None:
            return f"torch {build.version} was built without {vendor.title}", vendor.install
        if found.runtime is not None and found.runtime[0] < wanted[0]:
            have, need = (".".join(map(str, pair)) for pair in (found.runtime, wanted))
            is_served = found.runtime >= vendor.oldest_runtime
            return (
                f"the driver serves {vendor.title} {have} and torch {build.version} needs {need}",
                vendor.driver_remedy + (f", or {vendor.install}" if is_served else ""),
            )
        return "", ""

    def _detailed(self, build: TorchBuild, found: Found) -> tuple[DeviceInfo, ...]:
        return tuple(
            replace(device, details={**device.details, "torch": build.version})
            for device in found.devices
        )

    def _interpreted(self) -> DeviceInfo:
        return DeviceInfo(
            index=0,
            name=f"{self._vendor.title} kernels in Triton's interpreter",
            architecture=self._vendor.interpreted_architecture,
            details={"hardware": "interpreted", "mode": INTERPRETED},
        )

    def open(self, index: int) -> Device:
        probe = self.probe()
        name = self._vendor.name
        if not probe.is_usable:
            raise DeviceError(f"{name}:{index} cannot be opened: {probe.problem}; {probe.remedy}")
        if not 0 <= index < len(probe.devices):
            raise DeviceError(
                f"{name}:{index} was asked for; there are {len(probe.devices)} devices, from "
                f"{name}:0 to {name}:{len(probe.devices) - 1}"
            )
        from quire.backends.torch_accelerator.device import open_device

        return open_device(
            self._vendor,
            probe.devices[index],
            num_devices=len(probe.devices),
            is_interpreted=is_interpreting(),
        )
