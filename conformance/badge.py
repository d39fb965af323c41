"""The zero-patch badge: a backend that needs the public interface and changes nothing of Quire.

Read from the source alone, so that it can be granted before anything of the vendor's runs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import msgspec

from quire.conformance.patches import imports_of_quire, lines_of_patches
from quire.conformance.records import VendorCost
from quire.conformance.vendor_cost import cost_of, files_of
from quire.core.discovery import BackendEntry, list_backends
from quire.core.errors import ConfigError

PUBLIC = ("quire.core.interface", "quire.backends.reference")
"""What a backend may import, besides kernels (`quire.kernels_*`) and itself."""


class Badge(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a backend lives on the public interface alone, and what says that it does not."""

    backend: str
    distribution: str
    is_granted: bool
    findings: list[str]
    """`file:line: what is wrong there`."""
    cost: VendorCost


def make_badge(backend: str) -> Badge:
    """Checks the source of the backend's distribution; imports nothing of its modules.

    Raises: ConfigError if there is no backend of that name or none of its source can be read.
    """
    entries = [entry for entry in list_backends() if entry.name == backend]
    if not entries:
        raise ConfigError(f"backend {backend!r} is not installed (see `quire backends`)")
    findings = [found for entry in entries for found in _findings(entry)]
    return Badge(
        backend=backend,
        distribution=", ".join(f"{entry.distribution} {entry.version}" for entry in entries),
        is_granted=not findings,
        findings=findings,
        cost=cost_of(entries[0].target),
    )


def _findings(entry: BackendEntry) -> Iterator[str]:
    own = entry.target.partition(":")[0]
    files = _sources(entry, own)
    if not files:
        raise ConfigError(
            f"no Python source of {entry.target} can be read, so nothing can be said about it; "
            f"install {entry.distribution} with its sources"
        )
    for path in files:
        yield from findings_in(path, own=own)


def findings_in(path: Path, *, own: str = "") -> list[str]:
    """Imports beyond the public interface and patches in one file; `own` may be imported too."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        return [f"{path.name}:1: cannot be read as Python: {error}"]
    found = [
        (line, f"imports {name}, which is not public")
        for name, line in imports_of_quire(tree)
        if not _is_public(name, own)
    ]
    found += [(line, "changes an object of Quire's") for line in lines_of_patches(tree)]
    return [f"{path.name}:{line}: {what}" for line, what in sorted(found)]


def _is_public(name: str, own: str) -> bool:
    allowed = (*PUBLIC, own) if own else PUBLIC
    is_below = any(name == module or name.startswith(f"{module}.") for module in allowed)
    return is_below or name.startswith("quire.kernels_")


def _sources(entry: BackendEntry, own: str) -> list[Path]:
    """The package that the entry point names and, of a vendor, all that it installed beside it."""
    files = {path.resolve() for path in files_of(own)}
    if own.partition(".")[0] != "quire":
        files |= {path.resolve() for path in _installed(entry.distribution)}
    return sorted(files)


def _installed(name: str) -> Iterator[Path]:
    try:
        listed = distribution(name).files or []
    except PackageNotFoundError:
        return
    for file in listed:
        path = Path(str(file.locate()))
        if path.suffix == ".py" and path.exists():
            yield path
