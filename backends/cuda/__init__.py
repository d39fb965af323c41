"""NVIDIA's devices, through torch and Triton. Importing this imports neither."""

from __future__ import annotations

from quire.backends.cuda.backend import CudaBackend

__all__ = ["CudaBackend"]
