"""What differs between vendors, as data. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quire.core.interface import DeviceInfo

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a generation of a vendor's devices can do beyond the others."""

    has_bfloat16: bool = True
    fp8: tuple[str, ...] = ()
    """The 8-bit floats that caches may have: OCP's `float8_e4m3fn` and `float8_e5m2`, AMD's own
    `float8_e4m3fnuz`.
    """
    fp8_units: str = ""
    """The 8-bit float that matrix units multiply; empty: none, and weights are widened."""
    has_graphs: bool = True
    """Whether steps are recorded, where torch's version can."""


Copies = Callable[[Sequence[tuple["Tensor", "Tensor"]]], None]
"""Copies (source, target) pairs of a device's tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """One vendor, as the shared backend needs to know it."""

    name: str
    """Of the backend: `cuda`."""
    title: str
    """For messages: `CUDA`."""
    torch_type: str
    """What torch calls the device: ROCm's builds of torch say `cuda` too."""
    collectives: str
    """torch.distributed's backend: `nccl`, `xccl`."""
    build_field: str
    """The field of torch's version module that says whether the build is for this vendor."""
    torch_index: str
    """Where pip finds torch for this vendor."""
    driver_remedy: str
    """What to do where the driver is too old or missing."""
    architectures: Mapping[str, Architecture]
    """By the beginning of `DeviceInfo.architecture`, the longest that fits."""
    read_tables: Callable[[str], Path | None]
    """The launch table of an architecture; None: the portable one."""
    interpreted_architecture: str
    """Whose claims the interpreter makes."""
    oldest_runtime: tuple[int, int] = (0, 0)
    """Of the builds of torch at `torch_index`, where drivers say what they serve."""
    open_copies: Callable[[str, str], Copies] | None = None
    """Of (architecture, torch's device, whose context is there): copies by one launch. None: torch
    copies, one after the other. Raises: RuntimeError with the cause where it cannot be had.
    """

    @property
    def install(self) -> str:
        """The command that puts torch for this vendor in the place of another."""
        return f"pip install --force-reinstall torch --index-url {self.torch_index}"

    def architecture(self, name: str) -> Architecture:
        """What devices of architecture `name` can do; conservative for unknown ones."""
        known = [prefix for prefix in self.architectures if name.startswith(prefix)]
        return self.architectures[max(known, key=len)] if known else Architecture(has_graphs=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a vendor's probe found, before anybody asked whether torch can use it."""

    devices: tuple[DeviceInfo, ...] = ()
    runtime: tuple[int, int] | None = None
    """The newest version of the vendor's runtime that the driver serves, where it says so."""
    problem: str = ""
    """Why there is no device."""
    remedy: str = ""
