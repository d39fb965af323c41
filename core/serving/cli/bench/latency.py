"""`quire bench latency`: how long one batch takes, again and again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.config import EngineConfig
from quire.core.serving.cli.bench.prompts import random_prompts
from quire.core.serving.cli.bench.report import distribution, engine_setup, publish
from quire.core.serving.cli.engine_run import run_batch, run_engine
from quire.core.serving.cli.options import with_engine_options

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine


@with_engine_options
def latency(
    config: EngineConfig,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in the batch.")] = 8,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an output.")] = 64,
    num_warmups: Annotated[int, typer.Option(min=0, help="Batches before the first.")] = 2,
    num_iterations: Annotated[int, typer.Option(min=1, help="Batches that count.")] = 10,
    write_json: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Run one batch repeatedly, each time with new prompts, so that no cached prefix helps."""
    from quire.core.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)

    async def work(engine: AsyncEngine) -> None:
        times_s = []
        for iteration in range(num_warmups + num_iterations):
            ids = range(engine.facts.vocab_size)
            prompts = random_prompts(batch_size, input_len, ids, seed=iteration)
            result = await run_batch(engine, prompts, params, name=f"batch-{iteration}")
            if iteration >= num_warmups:
                times_s.append(result.elapsed_s)
        numbers = distribution("batch", times_s)
        numbers["output_token_mean_ms"] = numbers["batch_mean_ms"] / output_len
        setup = {"batch_size": batch_size, "input_len": input_len, "output_len": output_len}
        setup["num_iterations"] = num_iterations
        publish("latency", numbers, setup | engine_setup(engine.facts), write_json)

    run_engine(config, work)
