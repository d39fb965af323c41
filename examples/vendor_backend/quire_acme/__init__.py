"""The Acme accelerator for Quire. Importing this imports neither torch nor a driver."""

from __future__ import annotations

from importlib.util import find_spec

from quire.core.interface import Backend, Device, DeviceError, DeviceInfo, Probe

_INFO = DeviceInfo(index=0, name="Acme One", architecture="acme1", details={"driver": "simulated"})


class AcmeBackend(Backend):
    """Finds and opens Acme boards; here one, which the host's memory stands in for."""

    name = "acme"
    interface_version = "1.1"

    def probe(self) -> Probe:
        """A real vendor asks the driver here; nothing is opened yet."""
        if find_spec("torch") is None:
            return Probe(problem="torch is not installed", remedy='pip install "quire[torch]"')
        # Negative: only who asks for it by name gets it. A real accelerator says 100 or so.
        return Probe(devices=(_INFO,), priority=-1)

    def open(self, index: int) -> Device:
        """The one board."""
        if index != 0:
            raise DeviceError(f"acme:{index} was asked for; there is one board: use acme:0")
        from quire_acme.device import AcmeDevice

        return AcmeDevice(_INFO)
