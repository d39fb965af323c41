"""`quire bench throughput`: how many tokens a second, with everything there at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.config import EngineConfig
from quire.core.serving.cli.bench.prompts import random_prompts, read_prompts
from quire.core.serving.cli.bench.report import engine_setup, publish
from quire.core.serving.cli.engine_run import BatchResult, run_batch, run_engine
from quire.core.serving.cli.options import with_engine_options

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine


@with_engine_options
def throughput(
    config: EngineConfig,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts, all at once.")] = 64,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens of an output.")] = 64,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Prompts instead of random ones, one a line.")
    ] = None,
    prompts_seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    write_json: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Answer many prompts at once and count tokens a second."""
    from quire.core.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)

    async def work(engine: AsyncEngine) -> None:
        ids = range(engine.facts.vocab_size)
        prompts = (
            random_prompts(num_prompts, input_len, ids, prompts_seed)
            if prompts_file is None
            else read_prompts(prompts_file, num_prompts)
        )
        # The first request pays for what is made lazily; it is not what is asked about.
        await run_batch(engine, prompts[:1], SamplingParams(max_tokens=2), name="warm-up")
        await engine.reset_prefix_cache()
        result = await run_batch(engine, prompts, params)
        setup = {"num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
        publish("throughput", _numbers(result), setup | engine_setup(engine.facts), write_json)

    run_engine(config, work)


def _numbers(result: BatchResult) -> dict[str, float | int]:
    elapsed_s = max(result.elapsed_s, 1e-9)
    return {
        "requests": len(result.outputs),
        "prompt_tokens": result.num_prompt_tokens,
        "output_tokens": result.num_output_tokens,
        "elapsed_s": result.elapsed_s,
        "requests_per_s": len(result.outputs) / elapsed_s,
        "output_tokens_per_s": result.output_tokens_per_s,
        "total_tokens_per_s": (result.num_prompt_tokens + result.num_output_tokens) / elapsed_s,
    }
