"""AMD's devices, through torch's ROCm build and Triton. Importing this imports neither."""

from __future__ import annotations

from quire.backends.rocm.backend import RocmBackend

__all__ = ["RocmBackend"]
