"""Finds the backends that are installed, probes them, chooses one, and explains.

Listing reads the metadata of installed distributions and imports nothing of a backend. Loading goes
through stevedore, one name at a time, so that a broken plug-in stays one row in a table.
stevedore's own list of entry points is not used: its cache survives a reinstallation for minutes
and has forgotten which distribution an entry point came from.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import msgspec
from stevedore.driver import DriverManager

from quire.core.errors import ConfigError, PluginError
from quire.core.interface.backend import Backend, DeviceInfo, Probe
from quire.core.interface.version import check_interface_version

NAMESPACE = "quire.backends"
_INSPECTION_S = 120
"""Longer than any driver needs to say what devices there are."""
_NUM_INSPECTIONS = 4
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendEntry:
    """One entry point of `quire.backends`; nothing of it has been imported."""

    name: str
    target: str
    """`module:Class`."""
    distribution: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendReport:
    """What became of one entry when it was loaded and probed."""

    entry: BackendEntry
    backend: Backend | None = None
    interface_version: str = ""
    probe: Probe | None = None
    error: str = ""
    """Why it cannot be used; empty: it was loaded."""
    details: str = ""
    """The traceback behind `error`."""

    @property
    def is_usable(self) -> bool:
        """Whether it has a device to open."""
        return self.probe is not None and self.probe.is_usable

    @property
    def is_left_unused(self) -> bool:
        """Whether it found a device that it would prefer and cannot use: it says why."""
        return self.probe is not None and not self.probe.is_usable and self.probe.priority > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenDevice:
    """The device that an engine will run on, and why."""

    name: str
    backend: Backend
    index: int
    info: DeviceInfo
    why: str
    considered: tuple[BackendReport, ...]


class _FreshDriverManager(DriverManager[Any]):
    """A DriverManager that reads the entry points as they are now."""

    def list_entry_points(self) -> list[EntryPoint]:
        return _entry_points()


def list_backends() -> list[BackendEntry]:
    """Every backend installed now, by name, from metadata alone: imports nothing of them."""
    entries = [_entry_of(point) for point in _entry_points()]
    return sorted(entries, key=lambda entry: (entry.name, entry.distribution))


def load_backend(name: str) -> Backend:
    """The backend called `name`, constructed and of an interface version that this Quire speaks.

    Raises: ConfigError if nothing of that name is installed; PluginError, with the traceback, if it
    is and cannot be used.
    """
    matches = [entry for entry in list_backends() if entry.name == name]
    if not matches:
        installed = ", ".join(sorted({entry.name for entry in list_backends()})) or "none"
        raise ConfigError(
            f"device {name!r} was asked for; installed backends are: {installed}. "
            "Install the package that brings it, or choose one of these (see `quire backends`)"
        )
    if len(matches) > 1:
        claims = " and ".join(f"{m.distribution} {m.version} ({m.target})" for m in matches)
        raise PluginError(f"the name {name!r} is claimed by {claims}; uninstall all but one")
    return _construct(matches[0])


def inspect_backends() -> list[BackendReport]:
    """Loads and probes every installed backend; one that is broken is reported, never raised."""
    return [_inspect(entry) for entry in list_backends()]


def inspect_backends_apart() -> list[BackendReport]:
    """As `inspect_backends`, each backend in a process of its own: none is loaded into this one.

    A plug-in that ends or crashes its process, or hangs, is a row like any other. `backend` is None
    in every report.
    """
    with ThreadPoolExecutor(max_workers=_NUM_INSPECTIONS) as pool:
        return list(pool.map(_inspect_apart, list_backends()))


def choose_device(asked: str = "auto") -> ChosenDevice:
    """The device for `name`, `name:index` or `auto` (the usable backend of the highest priority).

    Raises: ConfigError with every backend's own reason if there is none; PluginError for a broken
    one asked by name.
    """
    if asked == "auto":
        return _choose_best()
    name, _, index_text = asked.partition(":")
    if index_text and not index_text.isdigit():
        raise ConfigError(f"device {asked!r}: the index after the colon must be a whole number")
    backend = load_backend(name)
    probe = backend.probe()
    return _device_of(name, backend, probe, int(index_text or 0), is_index_given=bool(index_text))


def _entry_points() -> list[EntryPoint]:
    importlib.invalidate_caches()
    return list(entry_points(group=NAMESPACE))


def _entry_of(point: EntryPoint) -> BackendEntry:
    distribution = point.dist
    return BackendEntry(
        name=point.name,
        target=point.value,
        distribution=distribution.name if distribution else "unknown",
        version=distribution.version if distribution else "unknown",
    )


def _construct(entry: BackendEntry) -> Backend:
    loaded = _load(entry)
    if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
        raise PluginError(
            f"backend {entry.name!r} of {entry.distribution} {entry.version}: {entry.target} is "
            f"{loaded!r}; it must name a subclass of quire.core.interface.Backend"
        )
    declared = getattr(loaded, "interface_version", None)
    check_interface_version(declared, backend=entry.name)
    if getattr(loaded, "name", None) != entry.name:
        raise PluginError(
            f"entry point {entry.name!r} of {entry.distribution} names a backend that calls itself "
            f"{getattr(loaded, 'name', None)!r}; make both the same"
        )
    try:
        return loaded()
    except Exception as error:
        raise _plugin_error(entry, "cannot be constructed", error) from error


def _load(entry: BackendEntry) -> object:
    """Imports what the entry names.

    Whatever its import raises, asserts or exits with becomes a PluginError.
    """
    try:
        return _FreshDriverManager(NAMESPACE, entry.name, invoke_on_load=False).driver
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _plugin_error(entry, "cannot be imported", error) from error


def _plugin_error(entry: BackendEntry, what: str, error: BaseException) -> PluginError:
    return PluginError(
        f"backend {entry.name!r} of {entry.distribution} {entry.version} ({entry.target}) {what}: "
        f"{type(error).__name__}: {error}. Repair or uninstall {entry.distribution}",
        details="".join(traceback.format_exception(error)),
    )


def _inspect(entry: BackendEntry) -> BackendReport:
    try:
        backend = load_backend(entry.name)
        probe = backend.probe()
    except PluginError as error:
        return BackendReport(entry=entry, error=str(error), details=error.details)
    except Exception as error:
        problem = _plugin_error(entry, "raised in its probe", error)
        return BackendReport(entry=entry, error=str(problem), details=problem.details)
    return BackendReport(
        entry=entry, backend=backend, interface_version=backend.interface_version, probe=probe
    )


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a process that inspected one backend writes down."""

    interface_version: str
    probe: Probe | None
    error: str
    details: str


_INSPECTION = """
import sys
from quire.core.discovery import answer_inspection
answer_inspection(sys.argv[1], sys.argv[2])
"""


def answer_inspection(name: str, path: str) -> None:
    """Inspects one backend and writes what came of it to a file: the other half, in the child."""
    report = next(_inspect(entry) for entry in list_backends() if entry.name == name)
    answer = _Answer(
        interface_version=report.interface_version,
        probe=report.probe,
        error=report.error,
        details=report.details,
    )
    Path(path).write_bytes(msgspec.json.encode(answer))


def _inspect_apart(entry: BackendEntry) -> BackendReport:
    with tempfile.TemporaryDirectory(prefix="quire-inspect-") as folder:
        path = Path(folder) / "answer.json"
        command = [sys.executable, "-c", _INSPECTION, entry.name, str(path)]
        try:
            done = subprocess.run(  # noqa: S603 - our own interpreter and names of entry points
                command, capture_output=True, text=True, timeout=_INSPECTION_S, check=False
            )
        except subprocess.TimeoutExpired:
            return _died(entry, f"did not answer within {_INSPECTION_S} s", "")
        if done.returncode != 0 or not path.exists():
            what = f"ended its process with status {done.returncode} when it was loaded"
            return _died(entry, what, done.stderr[-4000:])
        answer = msgspec.json.decode(path.read_bytes(), type=_Answer)
    return BackendReport(
        entry=entry,
        interface_version=answer.interface_version,
        probe=answer.probe,
        error=answer.error,
        details=answer.details,
    )


def _died(entry: BackendEntry, what: str, said: str) -> BackendReport:
    error = (
        f"backend {entry.name!r} of {entry.distribution} {entry.version} ({entry.target}) {what}. "
        f"Repair or uninstall {entry.distribution}"
    )
    return BackendReport(entry=entry, error=error, details=f"{said}\n{error}".strip())


def _choose_best() -> ChosenDevice:
    reports = inspect_backends()
    usable = [r for r in reports if r.is_usable and r.probe is not None and r.probe.priority >= 0]
    if not usable:
        raise ConfigError(f"no usable device was found:{_reasons(reports)}")
    for unused in (r for r in reports if r.is_left_unused):
        _LOGGER.warning("%s is left unused: %s", unused.entry.name, _why_unusable(unused))
    best = max(usable, key=lambda r: (r.probe.priority if r.probe else 0, r.entry.name))
    assert best.backend is not None, best
    assert best.probe is not None, best
    others = [r.entry.name for r in usable if r is not best]
    why = (
        "the only usable backend"
        if not others
        else (
            f"the highest priority ({best.probe.priority}) of "
            f"{', '.join([best.entry.name, *others])}"
        )
    )
    return ChosenDevice(
        name=best.entry.name,
        backend=best.backend,
        index=best.probe.devices[0].index,
        info=best.probe.devices[0],
        why=why,
        considered=tuple(reports),
    )


def _device_of(
    name: str, backend: Backend, probe: Probe, index: int, *, is_index_given: bool
) -> ChosenDevice:
    if not probe.is_usable:
        what = "cannot be used" if probe.priority > 0 else "has no device"
        raise ConfigError(
            f"device {name!r} was asked for and {what}: {probe.problem or 'none found'}. "
            f"{probe.remedy}".rstrip()
        )
    wanted = [d for d in probe.devices if d.index == index] if is_index_given else probe.devices[:1]
    if not wanted:
        there = ", ".join(str(d.index) for d in probe.devices)
        raise ConfigError(f"device {name}:{index} was asked for; {name} has devices {there}")
    return ChosenDevice(
        name=name,
        backend=backend,
        index=wanted[0].index,
        info=wanted[0],
        why="asked for",
        considered=(),
    )


def _why_unusable(report: BackendReport) -> str:
    assert report.probe is not None, report
    return f"{report.probe.problem or 'no device'}. {report.probe.remedy}".rstrip()


def _reasons(reports: Sequence[BackendReport]) -> str:
    lines = []
    for report in reports:
        if report.error:
            lines.append(f"\n  {report.entry.name}: {report.error}")
        elif not report.is_usable:
            lines.append(f"\n  {report.entry.name}: {_why_unusable(report)}")
        else:
            lines.append(f"\n  {report.entry.name}: for tests; ask for it by name")
    return "".join(lines) or '\n  no package offers one; pip install "quire[cpu]"'
