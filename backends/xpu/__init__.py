"""Intel's devices, through torch's XPU build and Triton. Importing this imports neither."""

from __future__ import annotations

from quire.backends.xpu.backend import XpuBackend

__all__ = ["XpuBackend"]
