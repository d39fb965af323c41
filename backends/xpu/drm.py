"""Intel's discrete GPUs as the kernel lists them in sysfs; nothing is opened.

Source: Linux, Documentation/ABI of drm; device numbers of Intel's compute runtime.
"""

from __future__ import annotations

import os
from pathlib import Path

from quire.backends.torch_accelerator.vendor import Found
from quire.core.interface import DeviceInfo

_CARDS = Path("sys/class/drm")
_NODES = Path("dev/dri")
_INTEL = "0x8086"
_DRIVERS = frozenset({"xe", "i915"})
_FAMILIES = {
    "0x0bd": ("Data Center GPU Max", "xe_hpc"),
    "0x56c": ("Data Center GPU Flex", "xe_hpg"),
    "0x56a": ("Arc A-Series", "xe_hpg"),
    "0xe20": ("Arc B-Series", "xe2_hpg"),
    "0xe21": ("Arc Pro B-Series", "xe2_hpg"),
}
"""By the first digits of the device number; integrated GPUs are not offered."""
_NO_DEVICE = (
    "install Intel's GPU driver (xe or i915) and Level Zero; in a container, start it with "
    "--device=/dev/dri"
)
_NO_RIGHTS = "add the user to the group render, and sign in again"


def find_devices(root: Path = Path("/")) -> Found:
    """The devices that Level Zero would see. `root` stands in for the file system in tests."""
    nodes = sorted((root / _CARDS).glob("renderD*"), key=lambda path: int(path.name[7:]))
    known = [(node, info) for node in nodes if (info := _read_card(node / "device")) is not None]
    if not known:
        return Found(problem="no discrete Intel GPU was found", remedy=_NO_DEVICE)
    usable = [
        info for node, info in known if os.access(root / _NODES / node.name, os.R_OK | os.W_OK)
    ]
    if not usable:
        names = ", ".join(f"/{_NODES}/{node.name}" for node, _ in known)
        return Found(problem=f"{names} may not be opened by this user", remedy=_NO_RIGHTS)
    devices = tuple(
        DeviceInfo(index=n, name=name, architecture=architecture, details={"driver": driver})
        for n, (name, architecture, driver) in enumerate(usable)
    )
    return Found(devices=devices)


def _read_card(device: Path) -> tuple[str, str, str] | None:
    """(name, architecture, driver) of a card; None for other vendors and integrated GPUs."""
    if _read(device / "vendor") != _INTEL:
        return None
    number = _read(device / "device")
    driver = (device / "driver").resolve().name
    family = next((f for prefix, f in _FAMILIES.items() if number.startswith(prefix)), None)
    if family is None or driver not in _DRIVERS:
        return None
    return f"Intel {family[0]} ({number})", family[1], driver


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip().lower()
    except OSError:
        return ""
