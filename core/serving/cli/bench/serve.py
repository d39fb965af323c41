"""`quire bench serve`: load on a running server of the OpenAI API, ours or another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.core.serving.cli.bench.arrivals import PROCESSES, Arrivals
from quire.core.serving.cli.bench.datasets import DATASETS
from quire.core.serving.cli.bench.report import publish
from quire.core.serving.cli.errors import FAILURE, require_extra


def serve(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first that it has.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask for chats, not completions.")] = False,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens (or words) of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an output.")] = 64,
    dataset: Annotated[str, typer.Option(help=f"{', '.join(DATASETS)}.")] = "random",
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="ShareGPT's .json, .jsonl of prompts or messages, or a prompt a line."),
    ] = None,
    arrivals: Annotated[str, typer.Option(help=f"{', '.join(PROCESSES)}.")] = "poisson",
    request_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Requests a second; default: all at once.")
    ] = None,
    burstiness: Annotated[float, typer.Option(help="Shape of gamma; below 1: bursts.")] = 1.0,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="The most requests in flight.")
    ] = None,
    ttft_limit_ms: Annotated[float | None, typer.Option(help="Of a good answer.")] = None,
    itl_limit_ms: Annotated[float | None, typer.Option(help="Of a good answer, mean.")] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for the full length; not all can.")] = True,
    api_key: Annotated[str | None, typer.Option(help="What the server asks for.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Of one request.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    write_json: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
    plots: Annotated[
        list[Path] | None, typer.Option("--plot", help="Write charts: .html or .png; repeatable.")
    ] = None,
) -> None:
    """Send requests to a running server; tell times, percentiles, throughput and goodput."""
    require_extra("bench", "httpx")
    from quire.core.serving.cli.bench.load import Limits, Load, PromptShape, measure

    setup: dict[str, Any] = dict(locals())
    for name in ("api_key", "plots", "write_json", "Limits", "Load", "PromptShape", "measure"):
        setup.pop(name)
    load = Load(
        url=url.rstrip("/"),
        model=model,
        output_len=output_len,
        is_chat=chat,
        ignores_eos=ignore_eos,
        arrivals=Arrivals(process=arrivals, rate=request_rate, burstiness=burstiness, seed=seed),
        max_concurrency=max_concurrency,
        api_key=api_key,
        timeout_s=timeout_s,
        seed=seed,
    )
    shape = PromptShape(number=num_prompts, length=input_len, file=prompts_file, dataset=dataset)
    seen = asyncio.run(measure(load, shape))
    setup |= {"model": seen.model, "prompts_file": str(prompts_file) if prompts_file else None}
    limits = Limits(first_token_ms=ttft_limit_ms, inter_token_ms=itl_limit_ms)
    _tell(seen, limits, setup, write_json, plots or [])


def _tell(
    seen: Any, limits: Any, setup: dict[str, Any], path: Path | None, plots: list[Path]
) -> None:
    from quire.core.serving.cli.bench.load import goodput_of, numbers_of
    from quire.core.serving.cli.bench.plots import make_plots, write_plots

    numbers = numbers_of(seen) | goodput_of(seen, limits)
    publish("serve", numbers, setup, path)
    for plot in plots:
        write_plots(plot, f"{seen.model} at {setup['url']}", make_plots(seen), numbers)
    if seen.errors:
        typer.echo("requests failed: " + "; ".join(seen.errors[:5]), err=True)
        raise typer.Exit(FAILURE)
