"""`quire serve`: the OpenAI-compatible server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.config import EngineConfig
from quire.core.env import read_environment
from quire.core.serving.cli.console import err
from quire.core.serving.cli.errors import require_extra
from quire.core.serving.cli.options import parse_bytes, with_engine_options
from quire.core.serving.settings import ServerSettings

if TYPE_CHECKING:
    from quire.core.serving.lifecycle import Announcement

_DEFAULTS = ServerSettings()


@with_engine_options
def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = _DEFAULTS.host,
    port: Annotated[int, typer.Option(help="0: any free port.")] = _DEFAULTS.port,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Clients must send it; may be repeated. Default: QUIRE_API_KEY."),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(parser=parse_bytes, help="The largest request (default: 32M).")
    ] = None,
    max_logprobs: Annotated[
        int, typer.Option(help="The most log-probabilities a position.")
    ] = _DEFAULTS.max_logprobs,
    shutdown_timeout_s: Annotated[
        float, typer.Option(help="Seconds that requests in flight have after SIGTERM.")
    ] = _DEFAULTS.shutdown_timeout_s,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that may call; may be repeated.")
    ] = None,
    trust_request_chat_template: Annotated[
        bool,
        typer.Option(
            "--trust-request-chat-template",
            help="Let clients bring chat templates, which are programs.",
        ),
    ] = False,
    exit_on_engine_death: Annotated[
        bool,
        typer.Option(
            "--exit-on-engine-death",
            help="Exit with 1 when the engine dies, instead of answering 503.",
        ),
    ] = False,
    ssl_certfile: Annotated[str | None, typer.Option(help="Certificate for https.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Key of the certificate.")] = None,
) -> None:
    """Serve a model over HTTP with the OpenAI API."""
    require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    from quire.core.serving.lifecycle import run_server

    environment_key = read_environment().api_key
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=tuple(api_key or ([environment_key] if environment_key else [])),
        max_body_bytes=_DEFAULTS.max_body_bytes if max_body_bytes is None else max_body_bytes,
        max_logprobs=max_logprobs,
        shutdown_timeout_s=shutdown_timeout_s,
        allowed_origins=tuple(allowed_origin or ()),
        trust_request_chat_template=trust_request_chat_template,
        exit_on_engine_death=exit_on_engine_death,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
    )
    err().print(f"loading {config.model}", style="dim", markup=False)
    status = run_server(config, settings, announce=_announce)
    raise typer.Exit(status)


def _announce(ready: Announcement) -> None:
    from quire.core.serving.cli.engine_run import describe

    start_s = sum(ready.engine.facts.startup_s.values())
    console = err()
    console.print(describe(ready.engine, start_s), style="dim", markup=False, soft_wrap=True)
    console.print(f"serving {ready.engine.facts.served_model_name} at {ready.url}/v1", markup=False)
