"""The compiled module, or the reason why there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence

try:
    from quire.kernels_cpu import _cpu
except ImportError as error:
    WHY_NOT_NATIVE: str | None = (
        f"the compiled CPU kernels are missing ({error}): Quire was installed without a C++ "
        "compiler, or runs from a checkout that is not installed; `pip install .` with a compiler "
        "builds them"
    )
    """Why HAVE_NATIVE is False; None when it is True."""
else:
    WHY_NOT_NATIVE = None

HAVE_NATIVE: bool = WHY_NOT_NATIVE is None
"""Whether the compiled module is part of this installation."""


def require_native() -> None:
    """Raises: RuntimeError if there is no compiled module, saying why and what to do."""
    if WHY_NOT_NATIVE is not None:
        raise RuntimeError(WHY_NOT_NATIVE)


def isa() -> str:
    """The ISA level in use: "generic", "avx2", "avx512_bf16" and so on."""
    require_native()
    return _cpu.isa()


def available_isas() -> list[str]:
    """The levels that this machine can run, the best first."""
    require_native()
    return _cpu.available_isas()


def use_isa(name: str) -> None:
    """Use one level for every later call in this process; for tests and comparisons.

    Raises: ValueError if this machine or this build does not have it.
    """
    require_native()
    _cpu.use_isa(name)


def pin_threads(cpus: Sequence[int]) -> bool:
    """Binds each thread of the pool to one of `cpus`, in turn; the calling thread is the first.

    Threads that start later inherit the caller's CPU. Returns whether the system did it.
    Raises: ValueError for a CPU that this process may not use.
    """
    require_native()
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(cpus)
    strangers = [cpu for cpu in cpus if cpu not in usable]
    if strangers or not cpus:
        raise ValueError(f"CPUs {strangers or 'none'} asked for; usable are {sorted(usable)}")
    return _cpu.pin_threads(cpus)
