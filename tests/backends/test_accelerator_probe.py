"""How accelerators are found without a driver's context, and what is said where they are not."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
from stand_in_machines import FakeNvml, make_drm, make_kfd

from quire.backends.cuda.backend import CUDA, CudaBackend
from quire.backends.cuda.nvml import find_devices as find_cuda
from quire.backends.rocm.backend import ROCM, RocmBackend
from quire.backends.rocm.topology import architecture_of
from quire.backends.rocm.topology import find_devices as find_rocm
from quire.backends.torch_accelerator.environment import is_interpreting, visible
from quire.backends.torch_accelerator.torch_build import TorchBuild
from quire.backends.torch_accelerator.vendor import Found
from quire.backends.xpu.backend import XPU, XpuBackend
from quire.backends.xpu.drm import find_devices as find_xpu
from quire.core.interface import DeviceError, DeviceInfo

BACKENDS = (CudaBackend, RocmBackend, XpuBackend)


@pytest.fixture(autouse=True)
def _nothing_is_hidden(monkeypatch):
    for name in (
        "TRITON_INTERPRET",
        "CUDA_VISIBLE_DEVICES",
        "ROCR_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)


def test_cuda_devices_are_described_by_nvml():
    """Name, architecture, memory and driver, without CUDA; the session is closed."""
    library = FakeNvml()
    found = find_cuda(library)
    assert [(d.index, d.name, d.architecture) for d in found.devices] == [
        (0, "H200", "sm_90"),
        (1, "H200", "sm_90"),
    ]
    assert found.devices[0].total_memory_bytes == 141 << 30
    assert found.runtime == (12, 8)
    assert not library.is_open


@pytest.mark.parametrize(
    ("text", "names"),
    [("1", ["GPU-bbbb"]), ("GPU-b,0", ["GPU-bbbb", "GPU-aaaa"]), ("7,0", []), ("", [])],
)
def test_cuda_devices_are_those_left_visible(monkeypatch, text, names):
    """In the order of the variable, up to the first entry that fits nothing."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    found = find_cuda(FakeNvml())
    assert [device.details["uuid"] for device in found.devices] == names
    assert [device.index for device in found.devices] == list(range(len(names)))
    assert bool(found.problem) != bool(names)


def test_cuda_driver_that_does_not_answer_is_told_with_its_error():
    """A mismatch of library and module asks for a restart."""
    found = find_cuda(FakeNvml(status=18))
    assert not found.devices
    assert "18" in found.problem
    assert "restart" in found.remedy


def test_rocm_devices_are_read_from_the_topology(tmp_path):
    """GPU nodes alone, with architecture and memory."""
    make_kfd(tmp_path)
    found = find_rocm(tmp_path)
    assert [d.architecture for d in found.devices] == ["gfx942"]
    assert found.devices[0].total_memory_bytes == 206141652992


@pytest.mark.parametrize(
    ("version", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (110000, "gfx1100"), (120001, "gfx1201")],
)
def test_rocm_architecture_is_spelt_as_compilers_do(version, name):
    """The stepping is hexadecimal."""
    assert architecture_of(version) == name


def test_rocm_without_rights_says_which_groups(tmp_path):
    """A device that may not be opened is not a missing one."""
    make_kfd(tmp_path)
    (tmp_path / "dev" / "kfd").unlink()
    found = find_rocm(tmp_path)
    assert not found.devices
    assert "render" in found.remedy


def test_xpu_devices_are_discrete_ones_of_intel(tmp_path):
    """Integrated graphics and other vendors are left out."""
    make_drm(tmp_path, [("0x8086", "0xe20b"), ("0x8086", "0x4680"), ("0x10de", "0x2330")])
    found = find_xpu(tmp_path)
    assert [d.architecture for d in found.devices] == ["xe2_hpg"]


@pytest.mark.parametrize("find", [find_rocm, find_xpu])
def test_machine_without_devices_gets_a_remedy(tmp_path, find):
    """Empty file systems are no error."""
    found = find(tmp_path)
    assert not found.devices
    assert found.problem
    assert found.remedy


def with_devices(backend_class, runtime=(12, 8)):
    class Here(backend_class):
        def _find(self):
            info = DeviceInfo(index=0, name="Thing", architecture="sm_90")
            return Found(devices=(info,), runtime=runtime)

    return Here()


@pytest.mark.parametrize(("backend", "vendor"), list(zip(BACKENDS, (CUDA, ROCM, XPU), strict=True)))
def test_torch_for_another_device_is_found_with_the_remedy(backend, vendor):
    """A device that torch was not built for is no device, and the command that helps is said."""
    probe = with_devices(backend)._probe(TorchBuild(fields={"__version__": "2.13.0+cpu"}))
    assert not probe.is_usable
    assert "2.13.0+cpu was built without" in probe.problem
    assert probe.remedy == vendor.install


def test_driver_older_than_torch_is_told_with_both_versions():
    """The driver's runtime and the one that torch needs stand in the message."""
    build = TorchBuild(fields={"__version__": "2.11.0", "cuda": "13.0"})
    probe = with_devices(CudaBackend)._probe(build)
    assert "12.8" in probe.problem
    assert "13.0" in probe.problem
    assert "driver" in probe.remedy


def test_fitting_torch_makes_a_device_usable_and_preferred():
    """Within a major version drivers serve newer minors."""
    build = TorchBuild(fields={"__version__": "2.11.0", "cuda": "12.9"})
    probe = with_devices(CudaBackend)._probe(build)
    assert probe.is_usable
    assert probe.priority > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_opening_what_is_not_there_is_a_device_error(backend):
    """With the probe's own words."""
    with pytest.raises(DeviceError, match=f"{backend.name}:0 cannot be opened"):
        backend().open(0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpreted_device_is_never_chosen_by_itself(monkeypatch, backend):
    """TRITON_INTERPRET=1 offers a device that says what it is, at a negative priority."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    probe = backend().probe()
    assert probe.is_usable
    assert probe.priority < 0
    assert "interpreted" in probe.devices[0].details["mode"]


def test_probing_imports_neither_torch_nor_triton():
    """Nor anything that could make a driver's context."""
    code = (
        "import sys\n"
        "from quire.backends.cuda import CudaBackend as A\n"
        "from quire.backends.rocm import RocmBackend as B\n"
        "from quire.backends.xpu import XpuBackend as C\n"
        "[b().probe() for b in (A, B, C)]\n"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_visible_takes_names_and_numbers_and_nothing_twice_as_all():
    """An unset variable hides nothing."""
    items = [("GPU-a", 1), ("GPU-b", 2)]
    assert visible(items, "X", {}) == [1, 2]
    assert visible(items, "X", {"X": "1,GPU-a"}) == [2, 1]
    assert visible(items, "X", {"X": "-1,0"}) == []


def test_interpreting_is_read_as_triton_reads_it():
    """1, true, on and yes; nothing else."""
    assert is_interpreting({"TRITON_INTERPRET": "1"})
    assert not is_interpreting({"TRITON_INTERPRET": "0"})
    assert not is_interpreting({})


def test_fake_library_speaks_ctypes():
    """The stand-in is called as the library is: pointers by reference."""
    number = ctypes.c_int()
    assert FakeNvml().nvmlDeviceGetCount_v2(ctypes.byref(number)) == 0
    assert number.value == 2
