"""`quire demo`: the shipped model answers, so that a fresh installation is seen to work."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.config import EngineConfig
from quire.core.serving.cli.console import err, out
from quire.core.serving.cli.engine_run import BatchResult, run_batch, run_engine
from quire.core.serving.cli.generate import stream_text
from quire.core.serving.cli.options import with_engine_options_for

if TYPE_CHECKING:
    from rich.console import Console

    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.outputs import RequestOutput

PROMPTS = (
    "def read_lines(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "import os\nimport sys\n\n",
    "for name in sorted(names):\n",
    "try:\n    value = int(text)\nexcept ",
    "def fibonacci(n):\n    if n < 2:\n        return ",
    'if __name__ == "__main__":\n',
    "with open(filename, 'rb') as file:\n",
)
"""The shipped model has read Python and little else."""


@with_engine_options_for("demo")
def demo(
    config: EngineConfig,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
) -> None:
    """Load the shipped model, stream one answer, then answer a batch with continuous batching."""
    from quire.core.discovery import choose_device

    chosen = choose_device(config.device)
    console = out()
    console.print(
        f"device: {chosen.name}:{chosen.index}, {chosen.info.name} ({chosen.why})",
        markup=False,
        soft_wrap=True,
    )

    async def work(engine: AsyncEngine) -> None:
        await _demonstrate(engine, console, max_tokens)

    run_engine(config, work)
    err().print("next: quire chat demo, quire serve demo, quire generate demo 'import '")


async def _demonstrate(engine: AsyncEngine, console: Console, max_tokens: int) -> None:
    from quire.core.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    console.rule("one prompt, streamed", align="left", characters="-")
    sys.stdout.write(PROMPTS[0])
    begun_s = time.monotonic()
    await stream_text(engine, PROMPTS[0], params, "demo-stream")
    alone = max_tokens / (time.monotonic() - begun_s)
    sys.stdout.write(f"\n\n{alone:.0f} tokens/s\n")
    sys.stdout.flush()
    result = await run_batch(engine, PROMPTS, params, name="demo")
    console.rule(f"{len(PROMPTS)} prompts at once", align="left", characters="-")
    for prompt, output in zip(PROMPTS, result.outputs, strict=True):
        _show(prompt, output)
    _summarize(console, result, alone)


def _show(prompt: str, output: RequestOutput) -> None:
    text = prompt + output.outputs[0].text
    lines = [line for line in text.splitlines() if line.strip()][:4]
    sys.stdout.write("\n".join(f"| {line[:96]}" for line in lines) + "\n\n")


def _summarize(console: Console, result: BatchResult, alone: float) -> None:
    console.print(
        f"{len(result.outputs)} prompts, {result.num_output_tokens} tokens in "
        f"{result.elapsed_s:.2f} s: {result.output_tokens_per_s:.0f} tokens/s together, "
        f"{result.output_tokens_per_s / alone:.1f} times the speed of one alone",
        markup=False,
        soft_wrap=True,
    )
