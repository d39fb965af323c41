"""`quire trace`: record the steps of one device, replay them on another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.errors import ConfigError
from quire.core.serving.cli.console import out, size, table
from quire.core.serving.cli.errors import require_extra

if TYPE_CHECKING:
    from quire.conformance.tracing.replaying import OperatorDifference, Replay

trace = typer.Typer(
    name="trace",
    help="Record the steps of one device and replay them on another.",
    no_args_is_help=True,
)
_DETAILS = ("tensors", "digests", "none")


@trace.command()
def record(
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue while recording.")],
    model: Annotated[str, typer.Option(help="A model's directory or name.")] = "demo",
    device: Annotated[str, typer.Option(help="Where it runs, as in `quire backends`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 8,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the first prompt's sampling.")] = 0,
    block_size: Annotated[int | None, typer.Option(help="Tokens in a cache block.")] = None,
    operators: Annotated[
        str,
        typer.Option(
            help="tensors (replay names the first operator that differs), digests (whose bits "
            "differ; small), or none (results of steps alone)."
        ),
    ] = "tensors",
) -> None:
    """Run prompts and record every step: batches, results and operators."""
    require_extra("torch", "torch", "transformers")
    if operators not in _DETAILS:
        raise ConfigError(f"--operators {operators!r} is none of {', '.join(_DETAILS)}")
    from quire.conformance.tracing.recording import record as run
    from quire.core.sampling_params import SamplingParams

    sampling = SamplingParams(
        temperature=temperature, max_tokens=max_tokens, seed=seed, ignore_eos=True
    )
    count = run(
        model,
        prompts,
        output,
        sampling=sampling,
        detail=operators,
        device=device,
        dtype=dtype,
        **({} if block_size is None else {"block_size": block_size}),
    )
    typer.echo(f"wrote {output}: {count} steps, {size(output.stat().st_size)}")


@trace.command()
def replay(
    path: Annotated[Path, typer.Argument(help="A recorded trace.")],
    backend: Annotated[str, typer.Option(help="The backend, as in `quire backends`.")],
    model: Annotated[
        Path | None, typer.Option(help="Where the model is, if not where it was recorded.")
    ] = None,
) -> None:
    """Replay a trace on a backend. Ends with 1 if something differs beyond rounding."""
    require_extra("torch", "torch", "transformers")
    from quire.conformance.tracing.replaying import replay as run
    from quire.conformance.tracing.traces import read_trace
    from quire.core.discovery import choose_device

    recorded = read_trace(path)
    chosen = choose_device(backend)
    device = chosen.backend.open(chosen.index)
    try:
        found = run(recorded, device, model=model)
    finally:
        device.close()
    header = recorded.header
    typer.echo(f"{path}: {found.num_steps} steps of {header.backend} ({header.device})")
    _show(found, chosen.name)
    if not found.is_same:
        raise typer.Exit(1)


def _show(found: Replay, name: str) -> None:
    if found.why_no_operators:
        typer.echo(f"operators were not compared: {found.why_no_operators}")
    elif found.operators:
        rows = [(op, s.num_calls, f"{s.headroom:.0%}") for op, s in found.operators.items()]
        columns = ("operator", "compared", "largest share of the bound")
        out().print(table(f"Operators of {name}", columns, rows))
    if found.result_difference:
        typer.echo(f"results differ first at {found.result_difference}")
    else:
        typer.echo("every step gave the recorded tokens")
    difference = found.operator_difference
    if difference is not None:
        typer.echo(
            f"the first operator that differs is {difference.op}, step {difference.step_id}, layer "
            f"{difference.layer}, call {difference.number}: {name} {difference.message}"
            f"{_share(difference)}"
        )
    elif found.result_difference and found.is_same:
        typer.echo(
            "every operator is within rounding: two tokens were nearly as likely as each other"
        )


def _share(difference: OperatorDifference) -> str:
    if difference.headroom == float("inf"):
        return ""
    where = f", in {difference.where}" if difference.where else ""
    return f" ({difference.headroom:.1f} times the bound{where})"
