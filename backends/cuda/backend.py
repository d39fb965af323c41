"""The factory of CUDA devices."""

from __future__ import annotations

from quire import kernels_cuda
from quire.backends.cuda.nvml import find_devices
from quire.backends.torch_accelerator import AcceleratorBackend, Found, Vendor
from quire.backends.torch_accelerator.vendor import Architecture, Copies


def _open_copies(architecture: str, torch_device: str) -> Copies:
    """A kernel of CUDA C++, built by the compiler that torch's build brings."""
    import torch

    from quire.kernels_cuda.copies import open_copies
    from quire.kernels_cuda.driver import open_compiler, open_driver

    device = torch.device(torch_device)
    torch.cuda.synchronize(device)  # the driver loads into the context of this thread
    major = int((torch.version.cuda or "0").partition(".")[0])
    copies = open_copies(
        architecture,
        device,
        lambda: torch.cuda.current_stream(device).cuda_stream,
        compiler=open_compiler(major),
        driver=open_driver(),
    )
    return copies.copy


_FP8 = ("float8_e4m3fn", "float8_e5m2")
CUDA = Vendor(
    name="cuda",
    title="CUDA",
    torch_type="cuda",
    collectives="nccl",
    build_field="cuda",
    torch_index="https://download.pytorch.org/whl/cu128",
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
    oldest_runtime=(12, 0),
    open_copies=_open_copies,
)


class CudaBackend(AcceleratorBackend):
    """NVIDIA's devices on this machine."""

    name = "cuda"
    interface_version = "1.1"
    _vendor = CUDA

    def _find(self) -> Found:
        return find_devices()
