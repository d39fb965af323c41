"""How much host memory a piece of work takes at its peak."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

_RESET_PEAK = "5"
"""What Linux takes in `clear_refs` to begin the high-water mark anew (proc(5), since 4.0)."""


class PeakMemory:
    """Measures what runs inside a `with` statement, for this process.

    `size_bytes` is the rise of the resident set to its high-water mark: 0 where the system does
    not tell, and too little where the allocator serves the work from memory that it kept.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self.size_bytes = 0
        self._proc = proc
        self._before = 0

    def __enter__(self) -> Self:
        self._before = self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before:
            self.size_bytes = max(0, self._read("VmHWM") - self._before)

    def _begin(self) -> int:
        try:
            (self._proc / "clear_refs").write_text(_RESET_PEAK)
        except OSError:
            return 0
        return self._read("VmRSS")

    def _read(self, field: str) -> int:
        """A field of the process's status in bytes; 0 where it is not there."""
        try:
            lines = (self._proc / "status").read_text().splitlines()
        except OSError:
            return 0
        sizes = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
        return int(sizes[0]) * 1024 if sizes else 0
