"""What is NVIDIA's alone: launch tables by architecture, as data with provenance, and CUDA C++.

Importing this imports neither torch nor a library of CUDA's.
"""

from __future__ import annotations

from pathlib import Path

TABLES = Path(__file__).parent / "tables"
_GENERATIONS = {"sm_86": "sm_89", "sm_87": "sm_80", "sm_103": "sm_100", "sm_120": "sm_89"}
"""Architectures whose shared memory and matrix instructions are those of another's table."""


def table_path(architecture: str) -> Path | None:
    """The launch table of `sm_90` and the like; None: nobody has made one."""
    path = TABLES / f"{_GENERATIONS.get(architecture, architecture)}.json"
    return path if path.exists() else None
