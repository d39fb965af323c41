"""JAX and XLA for Quire: a device that torch does not own. Importing this imports no JAX."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from quire.core.interface import Backend, Device, DeviceError, DeviceInfo, Probe

_HOST = DeviceInfo(index=0, name="XLA on the host", architecture="cpu")
_REMEDY = 'pip install "jax" (or "jax[tpu]" on a machine with TPUs)'
_TPU_NODES = ("accel[0-9]*", "vfio/[0-9]*")


class JaxBackend(Backend):
    """Finds and opens what XLA compiles for: TPUs where there are some, or else the host."""

    name = "jax"
    interface_version = "1.1"

    def probe(self) -> Probe:
        """Looks for packages and device files; starts no runtime, so no TPU is taken."""
        missing = [name for name in ("jax", "jaxlib", "safetensors") if find_spec(name) is None]
        if missing:
            return Probe(problem=f"not installed: {', '.join(missing)}", remedy=_REMEDY)
        count = _count_tpus()
        if not count:
            # Negative: a machine's own CPU is served faster by others; here it is by name alone.
            return Probe(devices=(_HOST,), priority=-1)
        devices = tuple(
            DeviceInfo(index=index, name="TPU", architecture="tpu") for index in range(count)
        )
        return Probe(devices=devices, priority=100)

    def open(self, index: int) -> Device:
        """Starts JAX's runtime and takes one of its devices."""
        found = {info.index: info for info in self.probe().devices}
        if index not in found:
            known = ", ".join(f"jax:{number}" for number in found) or "none"
            raise DeviceError(f"jax:{index} was asked for; there is {known}: choose one of these")
        from quire_jax.device import open_device

        return open_device(found[index])


def _count_tpus() -> int:
    if find_spec("libtpu") is None:
        return 0
    counts = (len(list(Path("/dev").glob(pattern))) for pattern in _TPU_NODES)
    return next((count for count in counts if count), 0)
