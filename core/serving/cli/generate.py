"""`quire generate`: one prompt streams, several are answered as a batch."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.core.config import EngineConfig
from quire.core.serving.cli.console import err
from quire.core.serving.cli.engine_run import BatchResult, run_batch, run_engine
from quire.core.serving.cli.options import with_engine_options, with_sampling_options

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.outputs import RequestOutput
    from quire.core.sampling_params import SamplingParams


@with_sampling_options
@with_engine_options
def generate(
    config: EngineConfig,
    sampling: dict[str, Any],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue; none: one from stdin.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a prompt, each on its line.")
    ] = False,
) -> None:
    """Continue prompts: one is streamed, several are answered together."""
    from quire.core.sampling_params import SamplingParams

    texts = prompts or [sys.stdin.read()]
    SamplingParams.from_user(**sampling)  # a wrong one is told before the model is loaded

    async def work(engine: AsyncEngine) -> None:
        params = SamplingParams.from_user(**{**engine.default_sampling, **sampling})
        if len(texts) == 1 and params.n == 1 and not as_json:
            await _stream(engine, texts[0], params)
            return
        result = await run_batch(engine, texts, params)
        show = _show_json if as_json else _show_text
        for output, text in zip(result.outputs, texts, strict=True):
            show(output, text)
        err().print(summary_of(result), style="dim")

    run_engine(config, work)


def summary_of(result: BatchResult) -> str:
    """How much was done, and how fast."""
    return (
        f"{len(result.outputs)} prompts, {result.num_prompt_tokens} + {result.num_output_tokens} "
        f"tokens in {result.elapsed_s:.2f} s: {result.output_tokens_per_s:.1f} output tokens/s"
    )


async def _stream(engine: AsyncEngine, prompt: str, params: SamplingParams) -> None:
    await stream_text(engine, prompt, params, "generate-0")
    sys.stdout.write("\n")


async def stream_text(
    engine: AsyncEngine,
    prompt: str,
    params: SamplingParams,
    request_id: str,
    *,
    add_special_tokens: bool = True,
) -> str:
    """Writes the output to stdout as it comes; returns all of it.

    Raises: RequestError; EngineDeadError; DeviceError for a request that failed alone.
    """
    from quire.core.errors import DeviceError

    pieces = []
    async for output in engine.generate(
        prompt, params, request_id, output_kind="delta", add_special_tokens=add_special_tokens
    ):
        if output.error is not None:
            raise DeviceError(output.error)
        for child in output.outputs:
            pieces.append(child.text)
            sys.stdout.write(child.text)
        sys.stdout.flush()
    return "".join(pieces)


def _show_text(output: RequestOutput, prompt: str) -> None:
    for child in output.outputs:
        sys.stdout.write(f"=== {prompt}\n{child.text}\n")


def _show_json(output: RequestOutput, prompt: str) -> None:
    record = {
        "prompt": prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "outputs": [
            {
                "index": child.index,
                "text": child.text,
                "token_ids": list(child.token_ids),
                "finish_reason": child.finish_reason,
                "stop_reason": child.stop_reason,
            }
            for child in output.outputs
        ],
    }
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
