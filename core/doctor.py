"""What is installed, what does not fit together, and what to do about it.

Reads metadata. Backends are asked and torch is imported in other processes; opens no device.
"""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from quire.core.discovery import BackendReport, inspect_backends_apart
from quire.core.env import read_environment
from quire.core.interface.version import INTERFACE_VERSION

OK, NOTE, WARNING, WRONG = "ok", "note", "warning", "wrong"

MIN_MEMORY_BYTES = 1 << 30
"""Below this not even a small model with its cache and torch itself fit."""
_RUNTIME_EXTRA = "torch"
"""The extra that every device whose tensors torch owns needs."""
_EXTRAS_FOR_DEVELOPERS = frozenset({"docs", "lint", "test"})
_IMPORT_S = 120
"""Longer than any disk needs to import torch."""
_NOT_A_BUILD = frozenset({"__version__", "git_version", "debug"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the diagnosis."""

    status: str
    """`ok`, `note` (a fact that limits), `warning` (works, but worse than it could), `wrong`."""
    subject: str
    """What it is about: `python`, `torch`, `extra serve`, `backend acme`."""
    found: str
    """What is so."""
    remedy: str = ""
    """What to do; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """The packages of this environment, as their metadata describe them."""

    requirements: tuple[Requirement, ...]
    """Quire's own, those of its extras included."""
    requires_python: str
    """The range of Python's versions that Quire is made for; empty: not said."""
    find_version: Callable[[str], str | None]
    """A distribution's version; None: not installed."""


def diagnose() -> list[Finding]:
    """Everything there is to say about this environment. Loads each backend in another process.

    Never raises for what is broken: that is what it reports.
    """
    installed = read_installed()
    reports = inspect_backends_apart()
    return [
        *check_versions(installed),
        *check_extras(installed),
        *check_vendors(installed, _vendors(reports)),
        *check_torch(),
        *check_backends(reports),
        *check_cache_directory(read_environment().cache_directory),
        *check_memory(reports, _available_bytes()),
    ]


def _vendors(reports: Sequence[BackendReport]) -> dict[str, tuple[Requirement, ...]]:
    """What each distribution that brings a backend, beside Quire itself, asks for."""
    names = dict.fromkeys(report.entry.distribution for report in reports)
    return {name: _requirements_of(name) for name in names if canonicalize_name(name) != "quire"}


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing is wrong; notes and warnings do not count."""
    return all(finding.status != WRONG for finding in findings)


def read_installed() -> Installed:
    """The environment that this process runs in."""
    return Installed(
        requirements=_requirements_of("quire"),
        requires_python=_requires_python(),
        find_version=_find_version,
    )


def _requirements_of(distribution: str) -> tuple[Requirement, ...]:
    try:
        return tuple(map(Requirement, requires(distribution) or []))
    except PackageNotFoundError:
        return ()


def _requires_python() -> str:
    try:
        return str(metadata("quire").json.get("requires_python", ""))
    except PackageNotFoundError:
        return ""


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- packages -------------------------------------------------------------------------------------


def check_versions(installed: Installed) -> Iterator[Finding]:
    """Python, Quire and the packages that it cannot do without."""
    yield _python_finding(platform.python_version(), installed.requires_python)
    ours = installed.find_version("quire")
    if ours is None:
        yield Finding(
            status=WRONG,
            subject="quire",
            found="runs from a folder without being installed, so it has no metadata",
            remedy="pip install . in that folder, or pip install quire",
        )
        return
    yield Finding(status=OK, subject="quire", found=f"{ours}, interface {INTERFACE_VERSION}")
    yield from _mismatches(installed, _requirements(installed, extra=""), is_needed=True)


def _python_finding(there: str, wanted: str) -> Finding:
    if SpecifierSet(wanted).contains(there, prereleases=True):
        found = f"{there}, {platform.system()} {platform.machine()}"
        return Finding(status=OK, subject="python", found=found)
    return Finding(
        status=WRONG,
        subject="python",
        found=f"{there}; quire needs {wanted}",
        remedy=f"make a virtual environment with a Python {wanted}",
    )


def check_vendors(
    installed: Installed, requirements: Mapping[str, Sequence[Requirement]]
) -> Iterator[Finding]:
    """Whether the packages that bring backends have what they ask for, by distribution."""
    for distribution, lines in requirements.items():
        needed = [r for r in lines if _applies(r, "")]
        yield from _mismatches(installed, needed, is_needed=True, owner=distribution)


def check_extras(installed: Installed) -> Iterator[Finding]:
    """Which extras are complete, and what of the others is missing."""
    told: list[list[Requirement]] = []
    for extra in _extras(installed):
        needed = _requirements(installed, extra=extra)
        if needed in told:
            continue  # an extra of another name with the same packages
        told.append(needed)
        missing = [r.name for r in needed if installed.find_version(r.name) is None]
        wrong = list(_mismatches(installed, needed, is_needed=False))
        yield from (f for f in wrong if _is_first_extra_of(installed, f.subject, extra))
        if extra in _EXTRAS_FOR_DEVELOPERS:
            continue
        if missing:
            yield Finding(
                status=NOTE,
                subject=f"extra {extra}",
                found=f"not installed: {', '.join(missing)}",
                remedy=f'pip install "quire[{extra}]" if you need it',
            )
        elif not wrong:
            yield Finding(status=OK, subject=f"extra {extra}", found=_versions(installed, needed))


def _mismatches(
    installed: Installed,
    needed: Sequence[Requirement],
    *,
    is_needed: bool,
    owner: str = "quire",
) -> Iterator[Finding]:
    for requirement in needed:
        there = installed.find_version(requirement.name)
        if there is None and not is_needed:
            continue
        if there is not None and requirement.specifier.contains(there, prereleases=True):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        yield Finding(
            status=WRONG,
            subject=requirement.name,
            found=f"{there or 'not installed'}; {owner} needs {wanted}",
            remedy=f'pip install "{wanted}"',
        )


def _requirements(installed: Installed, *, extra: str) -> list[Requirement]:
    """Those of one extra, extras that it includes resolved; of no extra: what is always needed."""
    found: dict[str, Requirement] = {}
    for requirement in installed.requirements:
        is_for_extra = "extra ==" in str(requirement.marker or "")
        if is_for_extra != bool(extra) or not _applies(requirement, extra):
            continue
        if canonicalize_name(requirement.name) == "quire":
            for other in requirement.extras - {extra}:
                found |= {r.name: r for r in _requirements(installed, extra=other)}
        else:
            found[requirement.name] = requirement
    return [found[name] for name in sorted(found)]


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _extras(installed: Installed) -> list[str]:
    """Names of the extras, in the order of the metadata."""
    names = [
        str(value)
        for requirement in installed.requirements
        for value in _extra_names(str(requirement.marker or ""))
    ]
    return list(dict.fromkeys(names))


def _extra_names(marker: str) -> Iterator[str]:
    for part in marker.split("extra == ")[1:]:
        yield part[1 : part.index(part[0], 1)]


def _is_first_extra_of(installed: Installed, name: str, extra: str) -> bool:
    """Whether `extra` is the first that needs `name`, so that a mismatch is told once."""
    needing = (
        other
        for other in _extras(installed)
        if any(r.name == name for r in _requirements(installed, extra=other))
    )
    return next(needing, extra) == extra


def _versions(installed: Installed, needed: Sequence[Requirement]) -> str:
    return ", ".join(f"{r.name} {installed.find_version(r.name)}" for r in needed)


# --- torch ----------------------------------------------------------------------------------------


def check_torch() -> Iterator[Finding]:
    """Which torch is installed and what it was built for, read from its own record of the build."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        yield Finding(
            status=NOTE,
            subject="torch",
            found="not installed: devices whose tensors torch owns cannot be opened",
            remedy=f'pip install "quire[{_RUNTIME_EXTRA}]"',
        )
        return
    build = read_torch_build(Path(spec.origin).parent / "version.py")
    if not build:
        yield Finding(
            status=WRONG,
            subject="torch",
            found=f"{spec.origin} has no readable record of its build; the installation is broken",
            remedy="pip install --force-reinstall torch",
        )
        return
    problem = _import_problem("torch")
    if problem:
        yield Finding(
            status=WRONG,
            subject="torch",
            found=f"{build['__version__']} cannot be imported: {problem}",
            remedy="install the build of torch that is made for this machine and its drivers",
        )
        return
    built = [f"{name} {text}" for name, text in build.items() if name not in _NOT_A_BUILD and text]
    what = ", ".join(built) or "the host alone"
    yield Finding(status=OK, subject="torch", found=f"{build['__version__']}, built for {what}")


def _import_problem(module: str) -> str:
    """The last line of what importing a module says, in a process of its own; empty: nothing."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and a constant
            command, capture_output=True, text=True, timeout=_IMPORT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"nothing came of it in {_IMPORT_S} s"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with {done.returncode}"


def read_torch_build(path: Path) -> Mapping[str, str]:
    """The names that torch's version.py sets to a text, in its order; empty: it says no version."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, str] = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found |= {t.id: value.value for t in targets if isinstance(t, ast.Name)}
    return found if "__version__" in found else {}


# --- backends -------------------------------------------------------------------------------------


def check_backends(reports: Sequence[BackendReport]) -> Iterator[Finding]:
    """Who is broken, who has no device, who could be faster."""
    claims = Counter(report.entry.name for report in reports)
    for name, count in claims.items():
        if count > 1:
            yield _claimed_twice(name, [r for r in reports if r.entry.name == name])
    for report in reports:
        if claims[report.entry.name] == 1:
            yield _finding_of(report)
    usable = [r for r in reports if r.is_usable and r.probe is not None and r.probe.priority >= 0]
    if not usable:
        yield Finding(
            status=WRONG,
            subject="devices",
            found="no backend offers a device to run models on",
            remedy="follow the remedies above, or install a package that brings a backend",
        )


def _claimed_twice(name: str, reports: Sequence[BackendReport]) -> Finding:
    owners = [f"{r.entry.distribution} {r.entry.version}" for r in reports]
    return Finding(
        status=WRONG,
        subject=f"backend {name}",
        found=f"the name is claimed by {' and '.join(owners)}; neither can be used",
        remedy=f"uninstall all but one: pip uninstall {reports[-1].entry.distribution}",
    )


def _finding_of(report: BackendReport) -> Finding:
    subject = f"backend {report.entry.name}"
    package = f"{report.entry.distribution} {report.entry.version}"
    probe = report.probe
    if probe is None:
        return Finding(
            status=WRONG,
            subject=subject,
            found=f"{package} cannot be loaded: {_last_line(report)}",
            remedy=f"repair or uninstall {report.entry.distribution}",
        )
    devices = ", ".join(device.name for device in probe.devices)
    if report.is_left_unused:
        return Finding(status=WARNING, subject=subject, found=probe.problem, remedy=probe.remedy)
    if not probe.is_usable:
        return Finding(
            status=NOTE,
            subject=subject,
            found=f"no device: {probe.problem or 'none found'}",
            remedy=probe.remedy,
        )
    if probe.problem and probe.priority >= 0:
        return Finding(
            status=WARNING,
            subject=subject,
            found=f"{devices}: {probe.problem}",
            remedy=probe.remedy,
        )
    return Finding(status=OK, subject=subject, found=f"{devices} ({package})")


def _last_line(report: BackendReport) -> str:
    """The last line of the traceback, which names the error; else what was said instead."""
    lines = report.details.strip().splitlines()
    return lines[-1].strip() if lines else report.error


# --- the machine ----------------------------------------------------------------------------------


def check_cache_directory(directory: Path) -> Iterator[Finding]:
    """Whether what was compiled or downloaded can be kept; creates nothing."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield Finding(status=OK, subject="cache directory", found=str(directory))
        return
    why = "may not be written to" if there.is_dir() else "is no directory"
    yield Finding(
        status=WRONG,
        subject="cache directory",
        found=f"{directory} cannot be used: {there} {why}",
        remedy="set QUIRE_CACHE to a directory that you may write to",
    )


def check_memory(
    reports: Sequence[BackendReport], available_bytes: int | None
) -> Iterator[Finding]:
    """Whether the host now, and each device at all, have room for a small model."""
    if available_bytes is not None:
        yield _memory_finding("memory of the host", available_bytes, "available now")
    for report in reports:
        for device in report.probe.devices if report.probe else ():
            total_bytes = device.total_memory_bytes
            if total_bytes is not None and total_bytes < MIN_MEMORY_BYTES:
                name = f"memory of {report.entry.name}:{device.index}"
                yield _memory_finding(name, total_bytes, "in all")


def _memory_finding(subject: str, num_bytes: int, when: str) -> Finding:
    found = f"{num_bytes / (1 << 30):.1f} GiB {when}"
    if num_bytes >= MIN_MEMORY_BYTES:
        return Finding(status=OK, subject=subject, found=found)
    return Finding(
        status=WRONG,
        subject=subject,
        found=f"{found}: too little for a small model and its cache",
        remedy="end other programs, or give this process or container more memory",
    )


def _available_bytes(path: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that programs can still take; None: the system does not say it in this way."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None
