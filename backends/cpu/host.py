"""What this machine's operating system says of its CPU and memory. Imports no torch."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quire.core.interface import MemoryInfo

_ARCHITECTURES = (
    # Best first: what matrix products are chosen by. The second name is the flag of the kernel.
    ("amx_bf16", "amx_bf16"),
    ("avx512_bf16", "avx512_bf16"),
    ("avx512_vnni", "avx512_vnni"),
    ("avx512", "avx512f"),
    ("avx2", "avx2"),
    ("sve_bf16", "svebf16"),
    ("neon_bf16", "bf16"),
    ("neon", "asimd"),
)
_NATIVE_BFLOAT16 = frozenset({"amx_bf16", "avx512_bf16", "svebf16", "bf16"})
_UNLIMITED = 1 << 60
"""cgroups write a huge number, or `max`, where there is no limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuFacts:
    """The processor."""

    name: str
    """As sold: `AMD EPYC 9554 64-Core Processor`."""
    flags: frozenset[str]
    """Instruction sets, as the kernel names them; empty where it does not say."""

    @property
    def architecture(self) -> str:
        """The best instruction set for matrix products, or the machine's own name."""
        return next((name for name, flag in _ARCHITECTURES if flag in self.flags), _machine())

    @property
    def has_bfloat16(self) -> bool:
        """Whether products of bfloat16 are computed by instructions made for them."""
        return not self.flags.isdisjoint(_NATIVE_BFLOAT16)


def read_cpu(path: Path = Path("/proc/cpuinfo")) -> CpuFacts:
    """The first processor that the kernel lists; what Python knows where it lists none."""
    fields = _first_processor(path)
    name = fields.get("model name") or platform.processor() or _machine()
    flags = fields.get("flags") or fields.get("Features") or ""
    return CpuFacts(name=name, flags=frozenset(flags.split()))


def _first_processor(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _machine() -> str:
    return platform.machine() or "unknown"


# --- memory ---------------------------------------------------------------------------------------


def read_memory(root: Path = Path("/")) -> MemoryInfo:
    """Memory that this process may use: the machine's, or less where a cgroup limits it."""
    total_bytes, free_bytes = _machine_memory(root)
    for limit, used in _cgroup_limits(root):
        total_bytes = min(total_bytes, limit)
        free_bytes = min(free_bytes, max(limit - used, 0))
    return MemoryInfo(total_bytes=total_bytes, free_bytes=free_bytes)


def _machine_memory(root: Path) -> tuple[int, int]:
    """Total and available, in bytes."""
    fields = {}
    for line in _read(root / "proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        fields[key] = int(value.split()[0]) * 1024
    if "MemTotal" in fields:
        return fields["MemTotal"], fields.get("MemAvailable", fields.get("MemFree", 0))
    total_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total_bytes, total_bytes


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes for each cgroup above this process, of either version."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            files = (base, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = (
                base / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                "total_inactive_file",
            )  # fmt: skip
        else:
            continue
        top, limit_file, used_file, reclaimable = files
        for folder in _up_to(top, top / path.lstrip("/")):
            limit = _number(_read(folder / limit_file))
            if limit is not None and limit < _UNLIMITED:
                used = _number(_read(folder / used_file)) or 0
                yield limit, used - _statistic(folder / "memory.stat", reclaimable)


def _up_to(top: Path, folder: Path) -> Iterator[Path]:
    """`folder` and all above it, up to `top`. In a container the inner ones may be out of sight."""
    while folder != top and top in folder.parents:
        yield folder
        folder = folder.parent
    yield top


def _statistic(path: Path, name: str) -> int:
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.lstrip("-").isdigit() else None


# --- cores ----------------------------------------------------------------------------------------


def count_cores(root: Path = Path("/")) -> int:
    """Physical cores that this process may keep busy: its affinity, within its cgroup's share.

    Two hardware threads of one core count once: matrix products fill a core with one.
    """
    return max(1, min(len(list_cores(root)), _cgroup_cores(root)))


def list_cores(root: Path = Path("/")) -> list[int]:
    """One CPU of each physical core that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
    else:
        cpus = list(range(os.cpu_count() or 1))
    topology = root / "sys/devices/system/cpu"
    first_of: dict[str, int] = {}
    for cpu in cpus:
        siblings = _read(topology / f"cpu{cpu}/topology/thread_siblings_list").strip()
        first_of.setdefault(siblings or str(cpu), cpu)
    return list(first_of.values())


def _cgroup_cores(root: Path) -> int:
    """How many cores the cgroup's share of time amounts to."""
    base = root / "sys/fs/cgroup"
    quota, _, period = _read(base / "cpu.max").strip().partition(" ")
    if not quota:
        quota = _read(base / "cpu/cpu.cfs_quota_us")
        period = _read(base / "cpu/cpu.cfs_period_us")
    share, length = _number(quota), _number(period)
    if share is None or share <= 0 or not length:
        return _UNLIMITED
    return round(share / length)
