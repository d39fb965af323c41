"""AMD's devices as the kernel's compute driver lists them in sysfs; nothing is opened.

Source: Linux, Documentation/ABI of amdkfd (`/sys/class/kfd/kfd/topology`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from quire.backends.torch_accelerator.environment import visible
from quire.backends.torch_accelerator.vendor import Found
from quire.core.interface import DeviceInfo

_NODES = Path("sys/class/kfd/kfd/topology/nodes")
_KFD = Path("dev/kfd")
_DRIVER = Path("sys/module/amdgpu/version")
_NO_DRIVER = (
    "install AMD's amdgpu driver; in a container, start it with --device=/dev/kfd --device=/dev/dri"
)
_NO_RIGHTS = "add the user to the groups render and video, and sign in again"


def find_devices(root: Path = Path("/")) -> Found:
    """The devices that HIP would see. `root` stands in for the file system in tests."""
    every = [info for path in _node_paths(root) if (info := _read_node(path, root)) is not None]
    if not every:
        has_driver = (root / _NODES).exists()
        problem = "AMD's driver lists no GPU" if has_driver else "no AMD compute driver was found"
        return Found(problem=problem, remedy=_NO_DRIVER)
    if not os.access(root / _KFD, os.R_OK | os.W_OK):
        return Found(problem=f"/{_KFD} may not be opened by this user", remedy=_NO_RIGHTS)
    chosen = visible(every, "ROCR_VISIBLE_DEVICES")
    chosen = visible([("", info) for info in chosen], "HIP_VISIBLE_DEVICES")
    if not chosen:
        problem = "ROCR_VISIBLE_DEVICES or HIP_VISIBLE_DEVICES hides all devices"
        return Found(problem=problem, remedy="unset them, or list devices that rocminfo shows")
    return Found(devices=tuple(replace(info, index=n) for n, info in enumerate(chosen)))


def architecture_of(version: int) -> str:
    """`gfx942` of 90402: major, minor and stepping, the last in hexadecimal."""
    major, minor, stepping = version // 10000, version // 100 % 100, version % 100
    return f"gfx{major}{minor:x}{stepping:x}"


def _node_paths(root: Path) -> list[Path]:
    try:
        return sorted((root / _NODES).iterdir(), key=lambda path: int(path.name))
    except (OSError, ValueError):
        return []


def _read_node(path: Path, root: Path) -> tuple[str, DeviceInfo] | None:
    """(unique name, device) of one node; None for CPUs."""
    fields = _read_fields(path / "properties")
    version = fields.get("gfx_target_version", 0)
    if not version or not fields.get("simd_count"):
        return None
    banks = sorted((path / "mem_banks").glob("*/properties"))
    total = sum(_read_fields(bank).get("size_in_bytes", 0) for bank in banks)
    architecture = architecture_of(version)
    info = DeviceInfo(
        index=0,
        name=_read_text(path / "name") or architecture,
        architecture=architecture,
        total_memory_bytes=total or None,
        details={"driver": _read_text(root / _DRIVER) or "of the kernel"},
    )
    return f"GPU-{fields.get('unique_id', 0):x}", info


def _read_fields(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _read_text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
