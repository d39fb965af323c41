"""What accelerators claim by architecture, and whom their groups of devices meet through."""

from __future__ import annotations

import pytest
import torch

from quire.backends.cuda.backend import CUDA
from quire.backends.rocm.backend import ROCM
from quire.backends.torch_accelerator import communicator
from quire.backends.torch_accelerator.device import _claims
from quire.backends.xpu.backend import XPU
from quire.core.interface import DeviceInfo

OCP, OWN = "float8_e4m3fn", "float8_e4m3fnuz"


def claims_of(vendor, architecture):
    info = DeviceInfo(index=0, name=architecture, architecture=architecture)
    return _claims(vendor, info, 4)


@pytest.mark.parametrize(
    ("vendor", "architecture", "caches", "units"),
    [
        (CUDA, "sm_80", set(), ""),
        (CUDA, "sm_89", {OCP}, OCP),
        (CUDA, "sm_90", {OCP}, OCP),
        (CUDA, "sm_100", {OCP}, OCP),
        (ROCM, "gfx90a", set(), ""),
        (ROCM, "gfx942", {OCP, OWN}, OWN),
        (ROCM, "gfx950", {OCP}, OCP),
        (ROCM, "gfx1100", set(), ""),
        (ROCM, "gfx1201", {OCP}, OCP),
        (XPU, "xe2", set(), ""),
    ],
)
def test_eight_bit_floats_have_the_flavour_of_the_architecture(vendor, architecture, caches, units):
    """The other flavour's bits are another number; weights in them run everywhere."""
    claims = claims_of(vendor, architecture)
    assert {d for d in claims.cache_dtypes if d.startswith("float8_e4m3")} == caches
    assert vendor.architecture(architecture).fp8_units == units
    assert "fp8" in claims.quantizations


@pytest.mark.parametrize(
    ("vendor", "architecture", "mode", "halves"),
    [
        (CUDA, "sm_90", "capture", ("bfloat16", "float16")),
        (CUDA, "sm_75", "capture", ("float16",)),
        (ROCM, "gfx942", "capture", ("bfloat16", "float16")),
        (XPU, "xe2", "capture", ("bfloat16", "float16")),
        (CUDA, "sm_999_of_tomorrow", "capture", ("bfloat16", "float16")),
        (ROCM, "gfx1999", "eager", ("bfloat16", "float16")),
    ],
)
def test_steps_dtypes_and_determinism_are_claimed_by_architecture(
    vendor, architecture, mode, halves
):
    """An unknown generation is taken for a conservative one; no more repeatability than is held."""
    claims = claims_of(vendor, architecture)
    assert claims.step_mode == mode
    assert claims.dtypes == (*halves, "float32")
    assert claims.determinism == "run_to_run"
    assert claims.is_asynchronous
    assert claims.copy_mode == "asynchronous"
    assert claims.max_tensor_parallel == 4


@pytest.mark.parametrize(
    ("vendor", "collectives", "torch_device"),
    [(CUDA, "nccl", "cuda:1"), (ROCM, "nccl", "cuda:1"), (XPU, "xccl", "xpu:1")],
)
def test_group_meets_through_the_vendors_library_bound_to_its_device(
    monkeypatch, vendor, collectives, torch_device
):
    """RCCL answers to the name of NCCL; a process that is bound to no device would guess one."""
    asked = {}
    monkeypatch.setattr(
        communicator.dist,
        "init_process_group",
        lambda name, **more: asked.update(name=name, **more),
    )
    group = communicator.join_group(
        [0, 1],
        rank=1,
        address="tcp://127.0.0.1:1",
        backend=vendor.collectives,
        torch_device=torch_device,
        limit=2,
    )
    assert (asked["name"], asked["device_id"]) == (collectives, torch.device(torch_device))
    assert (asked["rank"], asked["world_size"]) == (group.rank, group.world_size) == (1, 2)
