"""All commands, and what they have in common: errors, logging, the version."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

import quire
from quire.core.env import read_environment
from quire.core.errors import QuireError
from quire.core.serving.cli.backends import backends
from quire.core.serving.cli.batch import batch
from quire.core.serving.cli.bench import bench
from quire.core.serving.cli.chat import chat
from quire.core.serving.cli.conformance import conformance
from quire.core.serving.cli.console import show_error
from quire.core.serving.cli.demo import demo
from quire.core.serving.cli.doctor import doctor
from quire.core.serving.cli.errors import status_of
from quire.core.serving.cli.generate import generate
from quire.core.serving.cli.keys import key
from quire.core.serving.cli.plan import plan
from quire.core.serving.cli.serve import serve
from quire.core.serving.cli.top import top
from quire.core.serving.cli.trace import trace
from quire.core.serving.cli.tune import tune
from quire.core.serving.operations.logging_setup import set_up_logging


class _Commands(TyperGroup):
    """Shows errors that Quire raises on purpose as one message, and ends with their status."""

    def invoke(self, ctx: typer.Context) -> object:  # type: ignore[override]
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except QuireError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            raise typer.Exit(status_of(error)) from error


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"quire {quire.__version__}")
        raise typer.Exit


def _prepare(
    log_level: Annotated[
        str | None, typer.Option(help="debug, info, warning or error; default: QUIRE_LOG_LEVEL.")
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text, or json for machines; default: QUIRE_LOG_FORMAT.")
    ] = None,
    debug: Annotated[  # noqa: ARG001 - read from the context where errors are shown
        bool, typer.Option("--debug", help="Show tracebacks.")
    ] = False,
    version: Annotated[  # noqa: ARG001 - its callback acts
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Quire: an inference and serving engine whose accelerator is a plug-in."""
    environment = read_environment()
    set_up_logging(
        (log_level or environment.log_level).lower(),
        (log_format or environment.log_format).lower(),
    )


def _make_application() -> typer.Typer:
    app = typer.Typer(
        name="quire",
        cls=_Commands,
        callback=_prepare,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for command in (generate, chat, serve, batch, backends, plan, doctor, demo, top, key, tune):
        app.command()(command)
    app.add_typer(bench, name="bench")
    app.add_typer(conformance, name="conformance")
    app.add_typer(trace, name="trace")
    return app


application = _make_application()
