"""`quire tune`: lets a device find the launch parameters of its kernels, and writes them down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tune(
    device: Annotated[str, typer.Option(help="The device, as `name` or `name:index`.")],
    out: Annotated[Path, typer.Option(help="The launch table to write, as JSON.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny shapes, few candidates; figures mean nothing.")
    ] = False,
    minutes: Annotated[
        float, typer.Option(help="What has not begun by then is left as it was.", min=0.0)
    ] = 8.0,
) -> None:
    """Time candidates for each kernel on a device and write its launch table."""
    from quire.core.discovery import load_backend
    from quire.core.errors import ConfigError

    name, _, index = device.partition(":")
    if index and not index.isdecimal():
        raise ConfigError(f"device {device!r} was asked for; write `name` or `name:index`")
    opened = load_backend(name).open(int(index or 0))
    try:
        # Not of the contract: whoever keeps launch tables offers it, and nobody has to.
        work = getattr(opened, "tuner", None)
        if work is None:
            raise ConfigError(
                f"{name} has nothing to tune: its devices keep no launch tables; tune a device "
                "that does, as `quire backends` lists them"
            )
        typer.echo(work(out, is_dry=dry_run, minutes=minutes))
    finally:
        opened.close()
