"""CPUs: oneDNN for linear layers, compiled kernels for the rest, plain torch where neither is.

Importing this imports no torch; `CpuBackend.open` does.
"""

from __future__ import annotations

from quire.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
