"""The version of the hardware interface, and who may load."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quire.core.interface.errors import PluginError

INTERFACE_VERSION = "1.1"
"""`MAJOR.MINOR` of the contract in this package. A minor adds; a major removes or changes."""

_PATTERN = re.compile(r"(\d+)\.(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class InterfaceVersion:
    """A parsed `MAJOR.MINOR`."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


def parse_interface_version(text: object) -> InterfaceVersion:
    """The version that `text` spells.

    Raises: PluginError if it is not a string of the form `MAJOR.MINOR`.
    """
    match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise PluginError(
            f"interface_version is {text!r}; it must be a string MAJOR.MINOR such as "
            f"{INTERFACE_VERSION!r}"
        )
    return InterfaceVersion(int(match[1]), int(match[2]))


def check_interface_version(declared: object, *, backend: str) -> InterfaceVersion:
    """Accepts this minor and the one before it, within the same major.

    Raises: PluginError that names both versions and which side to upgrade.
    """
    theirs = parse_interface_version(declared)
    ours = parse_interface_version(INTERFACE_VERSION)
    if theirs.major == ours.major and ours.minor - 1 <= theirs.minor <= ours.minor:
        return theirs
    remedy = (
        f"upgrade quire to one that speaks {theirs}"
        if theirs > ours
        else f"upgrade the backend package to one written for {ours}"
    )
    oldest = InterfaceVersion(ours.major, max(ours.minor - 1, 0))
    raise PluginError(
        f"backend {backend!r} was written for interface {theirs}; this quire loads "
        f"{oldest} to {ours}: {remedy}"
    )
