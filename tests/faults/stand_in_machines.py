"""Machines with accelerators, as far as a probe sees them: a driver's library, and files of the kernel."""

from __future__ import annotations

from pathlib import Path


class FakeNvml:
    """NVML with two H200s. Arguments are as ctypes passes them."""

    def __init__(self, status=0, cuda=12080):
        self.status, self.cuda, self.is_open = status, cuda, False

    def nvmlInit_v2(self):
        self.is_open = not self.status
        return self.status

    def nvmlShutdown(self):
        self.is_open = False

    def _put(self, target, value):
        target._obj.value = value
        return 0

    def _write(self, buffer, text):
        buffer.value = text
        return 0

    def nvmlSystemGetDriverVersion(self, buffer, size):
        return self._write(buffer, b"570.1")

    def nvmlSystemGetCudaDriverVersion_v2(self, out):
        return self._put(out, self.cuda)

    def nvmlDeviceGetCount_v2(self, out):
        return self._put(out, 2)

    def nvmlDeviceGetHandleByIndex_v2(self, index, out):
        return self._put(out, 1000 + index.value)

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        self._put(major, 9)
        return self._put(minor, 0)

    def nvmlDeviceGetMemoryInfo(self, handle, out):
        out._obj.total = 141 << 30
        return 0

    def nvmlDeviceGetName(self, handle, buffer, size):
        return self._write(buffer, b"NVIDIA H200")

    def nvmlDeviceGetUUID(self, handle, buffer, size):
        return self._write(buffer, b"GPU-aaaa" if handle.value == 1000 else b"GPU-bbbb")


def make_kfd(root: Path) -> None:
    """One CPU node and one MI300X."""
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    for name, text in (
        ("0", "simd_count 0\ngfx_target_version 0\n"),
        ("1", "simd_count 1216\ngfx_target_version 90402\nunique_id 255\n"),
    ):
        (nodes / name / "mem_banks" / "0").mkdir(parents=True)
        (nodes / name / "properties").write_text(text)
        (nodes / name / "mem_banks" / "0" / "properties").write_text("size_in_bytes 206141652992\n")
    (root / "dev").mkdir()
    (root / "dev" / "kfd").write_text("")


def make_drm(root: Path, cards: list[tuple[str, str]]) -> None:
    """Cards of (vendor, device), that this user may open."""
    for number, (vendor, device) in enumerate(cards):
        card = root / "sys/class/drm" / f"renderD{128 + number}" / "device"
        (card / "xe").mkdir(parents=True)
        (card / "vendor").write_text(vendor + "\n")
        (card / "device").write_text(device + "\n")
        (card / "driver").symlink_to(card / "xe")
        node = root / "dev/dri" / f"renderD{128 + number}"
        node.parent.mkdir(parents=True, exist_ok=True)
        node.write_text("")


def install(name: str, root: Path, *, cuda: int = 12080) -> None:
    """Makes the probe of `name` see such a machine in this process. `cuda`: what NVIDIA's driver serves."""
    from functools import partial
    from importlib import import_module

    module = import_module(f"quire.backends.{name}.backend")
    where = FakeNvml(cuda=cuda) if name == "cuda" else root
    module.find_devices = partial(module.find_devices, where)
