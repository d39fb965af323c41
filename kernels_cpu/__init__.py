"""C++ kernels for CPUs, one source compiled for several ISA levels and chosen at run time.

A machine that had no compiler when Quire was installed has no compiled module: HAVE_NATIVE is then
False and every function here raises a RuntimeError that says so.
"""

from __future__ import annotations

from importlib.util import find_spec

HAVE_NATIVE: bool = find_spec("quire.kernels_cpu._cpu") is not None
"""Whether the compiled module is part of this installation."""

if HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


def isa() -> str:
    """The ISA level in use, for example "avx512"."""
    return _cpu.isa()


def available_isas() -> list[str]:
    """The levels that this machine can run, the best first."""
    return _cpu.available_isas()


def use_isa(name: str) -> None:
    """Use one level for every later call; for tests and comparisons. Raises: ValueError."""
    _cpu.use_isa(name)
