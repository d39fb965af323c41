"""The factory of CUDA devices."""

from __future__ import annotations

from quire import kernels_cuda
from quire.backends.cuda.nvml import find_devices
from quire.backends.torch_accelerator import AcceleratorBackend, Found, Vendor
from quire.backends.torch_accelerator.vendor import Architecture

_FP8 = ("float8_e4m3fn", "float8_e5m2")
CUDA = Vendor(
    name="cuda",
    title="CUDA",
    torch_type="cuda",
    collectives="nccl",
    build_field="cuda",
    install='pip install "quire[cuda]" with torch from https://download.pytorch.org/whl/cu128',
    driver_remedy="update NVIDIA's driver",
    architectures={
        "sm_7": Architecture(has_bfloat16=False),
        "sm_8": Architecture(),
        "sm_89": Architecture(fp8=_FP8, fp8_units="float8_e4m3fn"),
        "sm_9": Architecture(fp8=_FP8, fp8_units="float8_e4m3fn"),
        "sm_10": Architecture(fp8=_FP8, fp8_units="float8_e4m3fn"),
        "sm_11": Architecture(fp8=_FP8, fp8_units="float8_e4m3fn"),
        "sm_12": Architecture(fp8=_FP8, fp8_units="float8_e4m3fn"),
    },
    read_tables=kernels_cuda.table_path,
    interpreted_architecture="sm_90",
)


class CudaBackend(AcceleratorBackend):
    """NVIDIA's devices on this machine."""

    name = "cuda"
    interface_version = "1.1"
    _vendor = CUDA

    def _find(self) -> Found:
        return find_devices()
