"""`quire bench serve`: load on a server that speaks the OpenAI API, and how fast it answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.core.serving.cli.bench.report import publish
from quire.core.serving.cli.errors import FAILURE, require_extra


def serve(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that it has.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an output.")] = 64,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts instead of random ones, one a line.")
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(min=1e-6, help="Requests a second, Poisson; default: all at once."),
    ] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="The most requests in flight.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="What the server asks for.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Of one request.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    write_json: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Send requests to a running server; tell times to first token, between tokens and in all."""
    require_extra("bench", "httpx")
    from quire.core.serving.cli.bench.load import Load, PromptShape, measure, numbers_of

    load = Load(
        url=url.rstrip("/"),
        model=model,
        output_len=output_len,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        api_key=api_key,
        timeout_s=timeout_s,
        seed=seed,
    )
    shape = PromptShape(number=num_prompts, length=input_len, file=prompts_file)
    seen = asyncio.run(measure(load, shape))
    setup: dict[str, Any] = {
        "url": url,
        "model": seen.model,
        "num_prompts": num_prompts,
        "input_len": input_len,
    }
    setup |= {"output_len": output_len, "request_rate": request_rate}
    setup["max_concurrency"] = max_concurrency
    publish("serve", numbers_of(seen), setup, write_json)
    if seen.errors:
        typer.echo("requests failed: " + "; ".join(seen.errors[:5]), err=True)
        raise typer.Exit(FAILURE)
