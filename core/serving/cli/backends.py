"""`quire backends`: what is installed, what it found, and what to do where it found nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.serving.cli.console import out, size, table, write_json

if TYPE_CHECKING:
    from quire.core.discovery import BackendReport
    from quire.core.interface.backend import DeviceInfo


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, with every detail.")] = False,
) -> None:
    """List the installed backends and the devices that they find."""
    from quire.core.discovery import inspect_backends

    reports = inspect_backends()
    if as_json:
        write_json([_record(report) for report in reports])
        return
    columns = ("backend", "package", "interface", "devices", "priority", "problem", "remedy")
    out().print(table("Backends", columns, [_row(report) for report in reports]))


def _row(report: BackendReport) -> tuple[object, ...]:
    probe = report.probe
    return (
        report.entry.name,
        f"{report.entry.distribution} {report.entry.version}",
        report.interface_version,
        "\n".join(_device(device) for device in probe.devices) if probe else "",
        probe.priority if probe else "",
        report.error or (probe.problem if probe else ""),
        probe.remedy if probe else "",
    )


def _device(device: DeviceInfo) -> str:
    parts = [f"{device.index}: {device.name}"]
    if device.architecture:
        parts.append(device.architecture)
    if device.total_memory_bytes is not None:
        parts.append(size(device.total_memory_bytes))
    return ", ".join(parts)


def _record(report: BackendReport) -> dict[str, Any]:
    probe = report.probe
    return {
        "name": report.entry.name,
        "target": report.entry.target,
        "distribution": report.entry.distribution,
        "version": report.entry.version,
        "interface_version": report.interface_version,
        "is_usable": report.is_usable,
        "priority": probe.priority if probe else None,
        "problem": report.error or (probe.problem if probe else ""),
        "remedy": probe.remedy if probe else "",
        "traceback": report.details,
        "devices": [
            {
                "index": device.index,
                "name": device.name,
                "architecture": device.architecture,
                "total_memory_bytes": device.total_memory_bytes,
                "details": dict(device.details),
            }
            for device in (probe.devices if probe else ())
        ],
    }
