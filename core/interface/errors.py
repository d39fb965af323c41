"""Quire's exceptions, one tree.

    QuireError
    ├── ConfigError              what the user configured cannot be
    ├── UnsupportedError         asked for more than the device claims; carries every Reason
    ├── PluginError              a backend package cannot be loaded; carries its traceback
    ├── CheckpointError          a model's files are missing, corrupt or of an unknown kind
    ├── DeviceError              an accelerator failed
    │   ├── DeviceOutOfMemory    an allocation was refused; the device lives on
    │   └── DeviceLost           the device is gone; its worker must be restarted
    ├── RequestError             one request is malformed; nothing else in flight is harmed
    └── EngineDeadError          the engine core is gone; carries the root cause

Messages say what was asked, what is so, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class QuireError(Exception):
    """The root of every error that Quire raises on purpose."""


class ConfigError(QuireError):
    """The user's configuration is impossible or contradictory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One thing that stands between a request and a device."""

    code: str
    """Stable, dotted and machine-readable: `attention.head_size`, `memory.weights`."""
    need: str
    """What was asked."""
    have: str
    """What the device claims."""
    remedy: str
    """What the user can do."""

    def __str__(self) -> str:
        return f"[{self.code}] needs {self.need}; has {self.have}; {self.remedy}"


class UnsupportedError(QuireError):
    """More was asked than is claimed. `reasons` holds all of them, never only the first."""

    def __init__(self, reasons: Sequence[Reason], *, what: str = "this configuration") -> None:
        self.reasons = tuple(reasons)
        lines = "".join(f"\n  {reason}" for reason in self.reasons)
        super().__init__(f"{what} is not supported:{lines}")


class PluginError(QuireError):
    """A backend package could not be loaded. `details` holds its traceback, where there is one."""

    def __init__(self, message: str, *, details: str = "") -> None:
        self.details = details
        super().__init__(message)


class CheckpointError(QuireError):
    """A model's files are missing, corrupt, or of an architecture that Quire does not know."""


class DeviceError(QuireError):
    """An accelerator reported a failure."""


class DeviceOutOfMemory(DeviceError):  # noqa: N818 - says what happened
    """An allocation was refused. The device is usable afterwards."""

    def __init__(
        self, message: str, *, requested_bytes: int | None = None, tag: str = "unknown"
    ) -> None:
        self.requested_bytes = requested_bytes
        self.tag = tag
        super().__init__(message)


class DeviceLost(DeviceError):  # noqa: N818 - says what happened
    """The device no longer answers. Its worker must be restarted."""


class RequestError(QuireError):
    """One request is malformed. `param` names the offending field, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        self.param = param
        super().__init__(message)


class EngineDeadError(QuireError):
    """The engine core has died. `root_cause` is the child's own last error, if it left one."""

    def __init__(self, message: str, *, root_cause: str = "") -> None:
        self.root_cause = root_cause
        super().__init__(message if not root_cause else f"{message}\nRoot cause: {root_cause}")
