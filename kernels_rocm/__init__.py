"""What kernels need to know of ROCm's architectures: launch tables, as data with provenance."""

from __future__ import annotations

from pathlib import Path

TABLES = Path(__file__).parent / "tables"
_GENERATIONS = {
    "gfx950": "gfx942",
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
    "gfx1200": "gfx1201",
}
"""Architectures whose shared memory and matrix instructions are those of another's table."""


def table_path(architecture: str) -> Path | None:
    """The launch table of `gfx942` and the like; None: nobody has made one."""
    path = TABLES / f"{_GENERATIONS.get(architecture, architecture)}.json"
    return path if path.exists() else None
