"""How a kernel is started: through a launcher, with the configuration that a table gives it.

Every host function of this package takes a `Launcher` first. `DeviceLauncher` starts kernels on the
device that its tensors lie on (or in Triton's interpreter); `quire.kernels_triton.offline` has one
that compiles what would have been started, for devices that are not there.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"
"""The tables of this package: `portable` for any device, `interpreter` for Triton's interpreter."""

_MOST = "max_"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchEntry:
    """One row of a table: which launches it is for, and how they run."""

    kernel: str
    """The name that host functions ask for: `decode`, `rms_norm`."""
    when: Mapping[str, Any] = field(default_factory=dict)
    """Facts that must hold: equal, or for `max_x` a fact `x` that is no larger."""
    constants: Mapping[str, int] = field(default_factory=dict)
    """Compile-time parameters: tile sizes and the like."""
    options: Mapping[str, int] = field(default_factory=dict)
    """Of the compiler: `num_warps`, `num_stages`, on ROCm `waves_per_eu`."""
    max_spill_bytes: int = 0
    """How much a compiled kernel may spill; more than 0 only with a word in `note`."""
    uses_matrix_units: bool = False
    """Whether its assembly must hold matrix instructions in half precision."""
    note: str = ""

    def fits(self, kernel: str, facts: Mapping[str, Any]) -> bool:
        """Whether the row is for this launch."""
        return kernel == self.kernel and all(
            facts.get(name[len(_MOST) :], wanted + 1) <= wanted
            if name.startswith(_MOST)
            else facts.get(name) == wanted
            for name, wanted in self.when.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTable:
    """The launches of one architecture, and where their numbers come from."""

    architecture: str
    provenance: Mapping[str, str]
    """How the numbers were found: `method`, `device`, `triton`, `date`."""
    facts: Mapping[str, int]
    """Of the hardware: `compute_units`, `shared_bytes`, `warp_size`."""
    entries: tuple[LaunchEntry, ...]

    def find(self, kernel: str, facts: Mapping[str, Any]) -> LaunchEntry:
        """The first row that fits.

        Raises: LookupError naming kernel and facts if there is none.
        """
        for entry in self.entries:
            if entry.fits(kernel, facts):
                return entry
        raise LookupError(
            f"the launch table of {self.architecture} has no entry for {kernel} with {dict(facts)}"
        )


def read_table(path: Path) -> LaunchTable:
    """Reads a table from its JSON file. Raises: OSError, ValueError, TypeError if it is no table.

    Rows of the portable table stand behind those of the file, so that a file need only say what is
    special about its architecture.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    entries = [LaunchEntry(**row) for row in data.pop("entries")]
    if data.pop("extends", None) == "portable":
        entries += read_table(TABLES / "portable.json").entries
    return LaunchTable(entries=tuple(entries), **data)


class Launcher(ABC):
    """Starts kernels, with the configuration of one table."""

    def __init__(self, table: LaunchTable) -> None:
        self.table = table

    def find(self, kernel: str, **facts: Any) -> LaunchEntry:
        """The table's row for a launch."""
        return self.table.find(kernel, facts)

    @abstractmethod
    def start(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        entry: LaunchEntry,
    ) -> None:
        """Queues one kernel: tensors and numbers in order, then compile-time constants by name."""


class DeviceLauncher(Launcher):
    """Starts kernels where their tensors lie."""

    def start(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        entry: LaunchEntry,
    ) -> None:
        """Queues one kernel on the current stream; a grid without programs does nothing."""
        if 0 in grid:
            return
        kernel[tuple(grid)](*arguments, **constants, **entry.options)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less than `number`."""
    return 1 << max(0, number - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)
