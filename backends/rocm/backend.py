"""The factory of ROCm devices."""

from __future__ import annotations

from quire import kernels_rocm
from quire.backends.rocm.topology import find_devices
from quire.backends.torch_accelerator import AcceleratorBackend, Found, Vendor
from quire.backends.torch_accelerator.vendor import Architecture

_OCP = ("float8_e4m3fn", "float8_e5m2")
# The device converts its own flavour itself, and OCP's in a few instructions.
_BOTH = (*_OCP, "float8_e4m3fnuz")
ROCM = Vendor(
    name="rocm",
    title="ROCm",
    torch_type="cuda",
    collectives="nccl",
    build_field="hip",
    torch_index="https://download.pytorch.org/whl/rocm6.4",
    driver_remedy="install or update AMD's amdgpu driver",
    architectures={
        "gfx90a": Architecture(),
        "gfx942": Architecture(fp8=_BOTH, fp8_units="float8_e4m3fnuz"),
        "gfx950": Architecture(fp8=_OCP, fp8_units="float8_e4m3fn"),
        "gfx11": Architecture(),
        "gfx12": Architecture(fp8=_OCP, fp8_units="float8_e4m3fn"),
    },
    read_tables=kernels_rocm.table_path,
    interpreted_architecture="gfx942",
)


class RocmBackend(AcceleratorBackend):
    """AMD's devices on this machine."""

    name = "rocm"
    interface_version = "1.1"
    _vendor = ROCM

    def _find(self) -> Found:
        return find_devices()
