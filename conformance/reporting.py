"""From rows to a report, and from a report to files."""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

import quire
from quire import conformance
from quire.conformance.cases import all_cases, extension_cases
from quire.conformance.expectations import apply_expectations
from quire.conformance.extensions import judge_extensions
from quire.conformance.page import render
from quire.conformance.records import (
    SCHEMA_VERSION,
    Expectation,
    RawRun,
    Report,
    Row,
    VendorCost,
    checksum_of,
)
from quire.conformance.vendor_cost import cost_of
from quire.conformance.verdicts import judge, manifest_with
from quire.core.discovery import BackendEntry, list_backends, load_backend
from quire.core.errors import ConfigError
from quire.core.interface import INTERFACE_VERSION, Device

HARDWARE = "hardware"
"""The key of `DeviceInfo.details` under which a device says that it is none: `interpreted` (its
kernels run in an interpreter on the host), `simulated`."""
_NO_COST = VendorCost(files=0, lines_of_code=0, quire_modules=[], assignments=[])


def suite_hash() -> str:
    """Over the path and content of every Python file of the suite."""
    root = Path(str(conformance.__file__)).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return f"sha256:{digest.hexdigest()}"


def make_report(
    backend: str, raw: RawRun, *, is_sealed: bool, expectations: Sequence[Expectation] = ()
) -> Report:
    """The report of one run. Opens the device once more, for its name and its claims."""
    manifest = manifest_with(raw.level, raw.extensions)
    every_id = {case.id for case in (*all_cases(), *extension_cases())}
    rows, problems = apply_expectations(
        raw.rows, expectations, manifest=every_id, version=quire.__version__
    )
    problems += problems_of_ids(rows, manifest)
    entry = next((e for e in list_backends() if e.name == backend), None)
    device = _open(backend)
    info, claims = device.info, device.capabilities
    device.close()
    report = Report(
        schema_version=SCHEMA_VERSION,
        is_sealed=is_sealed,
        seed=raw.seed,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        level=raw.level,
        quire_version=quire.__version__,
        interface_version=INTERFACE_VERSION,
        suite_hash=suite_hash(),
        environment=_environment(info.details),
        backend=backend,
        distribution=_distribution(entry),
        device=info.name,
        architecture=info.architecture,
        is_torch=device.torch_device is not None,
        capabilities=_plain(claims),
        verdicts=judge(rows, level=raw.level, problems=problems),
        hardware=info.details.get(HARDWARE, "real"),
        extensions_tried=sorted(raw.extensions),
        extensions=judge_extensions(rows, tried=raw.extensions, capabilities=claims),
        counts=dict(sorted(Counter(row.outcome for row in rows).items())),
        missing=sorted(set(manifest) - {row.id for row in rows}),
        problems=problems,
        expectations=list(expectations),
        cost=cost_of(entry.target) if entry else _NO_COST,
        rows=rows,
    )
    return msgspec.structs.replace(report, checksum=checksum_of(report))


def problems_of_ids(rows: Sequence[Row], manifest: Sequence[str]) -> list[str]:
    """Rows that no case has, and cases that have two rows."""
    counts = Counter(row.id for row in rows)
    strangers = [f"{name}: not in the manifest" for name in counts if name not in set(manifest)]
    return strangers + [f"{name}: {n} rows" for name, n in counts.items() if n > 1]


def write_report(report: Report, folder: Path, *, baseline: Report | None = None) -> None:
    """Writes report.json, its schema and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = msgspec.json.format(msgspec.json.encode(report), indent=1)
    (folder / "report.json").write_bytes(encoded + b"\n")
    schema = msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Report)), indent=1)
    (folder / "report.schema.json").write_bytes(schema + b"\n")
    (folder / "report.html").write_text(render(report, baseline), encoding="utf-8")


def read_report(path: Path) -> Report:
    """A report from its file.

    Raises: ConfigError if it is none of this version of the schema.
    """
    try:
        content = path.read_bytes()
        schema_version = msgspec.json.decode(content, type=_Schema).schema_version
        if schema_version != SCHEMA_VERSION:
            raise ConfigError(
                f"{path} has schema {schema_version}; this quire reads {SCHEMA_VERSION}. Run the "
                "suite again, or read it with the quire that wrote it"
            )
        return msgspec.json.decode(content, type=Report)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path} is no conformance report: {error}") from error


class _Schema(msgspec.Struct, frozen=True):
    """What is read of a report before the rest is trusted to be there."""

    schema_version: str


def _open(name: str) -> Device:
    backend = load_backend(name)
    return backend.open(backend.probe().devices[0].index)


def _plain(capabilities: object) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(capabilities, order="deterministic")
    return plain


def _environment(details: Any) -> dict[str, str]:
    facts = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("torch", "numpy", "pytest"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    return facts | {str(key): str(value) for key, value in details.items()}


def _distribution(entry: BackendEntry | None) -> str:
    return f"{entry.distribution} {entry.version} ({entry.target})" if entry else "not installed"
