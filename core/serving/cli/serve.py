"""`quire serve`: the OpenAI-compatible server."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.config import EngineConfig
from quire.core.serving.cli.config_file import describe_settings, use_settings
from quire.core.serving.cli.console import err, out, table
from quire.core.serving.cli.errors import require_extra
from quire.core.serving.cli.options import with_engine_options, with_server_options
from quire.core.serving.operations.api_keys import read_keys
from quire.core.serving.settings import ServerSettings

if TYPE_CHECKING:
    from quire.core.serving.lifecycle import Announcement

QUEUED_PER_RUNNING = 16
"""Requests that wait for each that runs, where `--max-num-queued` says nothing."""


@with_server_options
@with_engine_options
def serve(
    ctx: typer.Context,
    config: EngineConfig,
    settings: dict[str, Any],
    config_file: Annotated[  # noqa: ARG001 - its callback acts
        Path | None,
        typer.Option(
            "--config",
            is_eager=True,
            callback=use_settings,
            help="A YAML or TOML file of settings; flags and QUIRE_* variables go before it.",
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(help="A TOML file of keys with scopes and limits; see docs/operations.md."),
    ] = None,
    show_config: Annotated[
        bool,
        typer.Option("--show-config", help="Show every setting and where it came from, and exit."),
    ] = False,
) -> None:
    """Serve a model over HTTP with the OpenAI API."""
    if api_keys_file is not None:
        settings["keys"] = tuple(read_keys(api_keys_file))
    for name in ("api_keys", "allowed_origins"):
        settings[name] = tuple(settings.get(name, ()))
    server_settings = ServerSettings(**settings)
    if show_config:
        out().print(table("Settings", ("setting", "value", "from"), describe_settings(ctx)))
        return
    require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    from quire.core.serving.lifecycle import run_server

    if server_settings.log_requests or server_settings.log_prompts:
        logging.getLogger("quire.access").setLevel(logging.INFO)
    err().print(f"loading {config.model}", style="dim", markup=False)
    raise typer.Exit(run_server(with_bounded_queue(config), server_settings, announce=_announce))


def with_bounded_queue(config: EngineConfig) -> EngineConfig:
    """A server without a bound of its own lets a multiple of what runs at once wait.

    Who comes later is told so at once, instead of waiting longer than any client does.
    """
    if config.max_num_queued is not None:
        return config
    return replace(config, max_num_queued=QUEUED_PER_RUNNING * config.max_num_seqs)


def _announce(ready: Announcement) -> None:
    from quire.core.serving.cli.engine_run import describe

    start_s = sum(ready.engine.facts.startup_s.values())
    console = err()
    console.print(describe(ready.engine, start_s), style="dim", markup=False, soft_wrap=True)
    for sentence in ready.said:
        console.print(sentence, style="dim", markup=False, soft_wrap=True)
    console.print(f"serving {ready.engine.facts.served_model_name} at {ready.url}/v1", markup=False)
    console.print(f"metrics at {ready.url}/metrics", style="dim", markup=False)
