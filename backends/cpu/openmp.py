"""How the threads of a parallel region wait for the next one."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

_CHOICES_OF_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_SHORT_SPIN = "1000"
"""Tens of microseconds: longer than from one operator of a step to the next, and no longer."""


def prefer_short_waits(environment: MutableMapping[str, str]) -> None:
    """Tells GNU's OpenMP to spin briefly before it sleeps, unless the user chose otherwise.

    Mutates `environment`. By default its threads spin for milliseconds. Whatever else wants a core
    then, such as the HTTP server of the same engine, takes it from the very thread that the others
    spin for: on two busy cores steps were seen to take several times as long as with short waits.
    It only has an effect before OpenMP is loaded, which importing torch or the kernels does.
    """
    if not any(name in environment for name in _CHOICES_OF_THE_USER):
        environment["GOMP_SPINCOUNT"] = _SHORT_SPIN


def binds_threads(environment: Mapping[str, str]) -> bool:
    """Whether the user has OpenMP bind its threads to CPUs."""
    chosen = environment.get("OMP_PROC_BIND", "false").strip().lower()
    return chosen not in ("", "false") or "GOMP_CPU_AFFINITY" in environment
