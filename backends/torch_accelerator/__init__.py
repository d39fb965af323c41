"""What the accelerators that torch knows share: everything but how they are found and named.

A vendor's package gives a `Vendor` and a way to find devices; devices, operators, attention,
queues, graphs and communicators are here, over the Triton kernels of `quire.kernels_triton`.
"""

from __future__ import annotations

from quire.backends.torch_accelerator.backend import AcceleratorBackend
from quire.backends.torch_accelerator.torch_build import TorchBuild
from quire.backends.torch_accelerator.vendor import Found, Vendor

__all__ = ["AcceleratorBackend", "Found", "TorchBuild", "Vendor"]
