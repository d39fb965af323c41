"""The command `quire`. Importing it loads neither torch nor the HTTP libraries."""

from __future__ import annotations


def main() -> None:
    """Runs the command line of this process and exits with its status."""
    from quire.core.serving.cli.application import application

    application()


__all__ = ["main"]
