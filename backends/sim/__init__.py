"""A simulated asynchronous device: real results, late, and poison where nobody may look yet.

It computes with the reference on host memory, but only when somebody waits. A result read before
its event, or a staging buffer written again before its upload is done, gives an error or garbage
here every time, where a real device would give it once a month.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.core.interface import Backend, DeviceError, DeviceInfo, Probe

if TYPE_CHECKING:
    from quire.core.interface import Device

INFO = DeviceInfo(
    index=0,
    name="simulated asynchronous device",
    architecture="sim",
    details={"hardware": "simulated"},
)


class SimBackend(Backend):
    """Offers one simulated device."""

    name = "sim"
    interface_version = "1.1"

    def probe(self) -> Probe:
        return Probe(devices=(INFO,), problem="defers its work on purpose; for tests", priority=-50)

    def open(self, index: int) -> Device:
        try:
            from quire.backends.sim.device import SimDevice
        except ImportError as error:
            raise DeviceError(
                f'sim computes with torch: {error}; pip install "quire[cpu]"'
            ) from error
        return SimDevice()
