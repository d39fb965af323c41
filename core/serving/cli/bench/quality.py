"""`quire bench quality`: what a precision costs, in perplexity and against float32."""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError
from quire.core.serving.cli.bench.report import engine_setup, publish
from quire.core.serving.cli.engine_run import run_batch, run_engine
from quire.core.serving.cli.options import with_engine_options

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine
    from quire.core.outputs import TokenLogprobs

_NUM_TOP = 20
"""Tokens of the reference between which the divergence tells apart; all others are one."""
_NUM_COMPARED = 200
"""Tokens that are asked of the other side, so that those of the reference are among them."""


@with_engine_options
def quality(
    config: EngineConfig,
    text: Annotated[
        Path | None,
        typer.Option(help="The text to predict; else what the demo model was not trained on."),
    ] = None,
    num_tokens: Annotated[int, typer.Option(min=2, help="How much of it.")] = 16384,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read at a time.")] = 512,
    write_json: Annotated[Path | None, typer.Option("--json", help="Write results here.")] = None,
) -> None:
    """Predict a text in float32 and as asked, and compare.

    The divergence is that of the distributions over the 20 tokens that float32 holds likeliest,
    with all others taken as one: a lower bound of the whole, and close to it.
    """
    content = held_out_text() if text is None else _read(text)
    window = min(window, config.max_model_len or window)
    plain = replace(
        config,
        dtype="float32",
        cache_dtype="auto",
        quantization=None,
        options={},
        max_model_len=None,
    )
    reference, _ = _predict(plain, content, num_tokens, window, _NUM_TOP)
    asked, setup = _predict(config, content, num_tokens, window, _NUM_COMPARED)
    results = compare(reference, asked)
    sizes = {"num_tokens": len(reference), "window": window, "quantization": config.quantization}
    publish("quality", results, sizes | setup, write_json)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model thought of one token of the text."""

    logprob: float
    """Of the token that came."""
    top: dict[int, float]
    """Log-probabilities of the likeliest tokens."""


def compare(reference: Sequence[Prediction], asked: Sequence[Prediction]) -> dict[str, float]:
    """Perplexities, the divergence, and how often the likeliest token is the same.

    Both have the same tokens in the same order.
    """
    before, after = perplexity(reference), perplexity(asked)
    pairs = list(zip(reference, asked, strict=True))
    divergences = sorted(divergence(ours.top, theirs.top) for ours, theirs in pairs)
    same = sum(_likeliest(ours) == _likeliest(theirs) for ours, theirs in pairs)
    return {
        "perplexity_float32": before,
        "perplexity": after,
        "perplexity_ratio": after / before,
        "divergence_mean_nats": sum(divergences) / len(divergences),
        "divergence_p99_nats": divergences[int(0.99 * (len(divergences) - 1))],
        "same_likeliest_token": same / len(pairs),
    }


def perplexity(predictions: Sequence[Prediction]) -> float:
    """exp of the mean of -log p of the tokens that came."""
    return math.exp(-sum(p.logprob for p in predictions) / len(predictions))


def divergence(p: dict[int, float], q: dict[int, float]) -> float:
    """Kullback and Leibler's, in nats, of p from q, over the likeliest of p that q lists.

    All other tokens count as one, which never adds to it. Source: Kullback & Leibler 1951.
    """
    shared = sorted(set(p) & set(q), key=lambda token: -p[token])[:_NUM_TOP]
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in shared)
    rest_p = 1 - sum(math.exp(p[token]) for token in shared)
    rest_q = 1 - sum(math.exp(q[token]) for token in shared)
    if rest_p > 0 and rest_q > 0:
        total += rest_p * math.log(rest_p / rest_q)
    return max(total, 0.0)


def held_out_text() -> str:
    """Modules of the standard library that the demo model has not seen, by its own record.

    Raises: ConfigError where the record or the library's sources are missing.
    """
    try:
        record = json.loads(files("quire").joinpath("demo/training.json").read_text("utf-8"))
        root = Path(sysconfig.get_path("stdlib"))
        names = record["text"]["held_out_files"]
        return "\n".join((root / name).read_text("utf-8") for name in names)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"the text that the demo model was not trained on cannot be read ({error}); give --text"
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text in {path} cannot be read: {error}") from error


def _likeliest(prediction: Prediction) -> int:
    return max(prediction.top, key=lambda token: prediction.top[token])


def _predict(
    config: EngineConfig, content: str, num_tokens: int, window: int, num_top: int
) -> tuple[list[Prediction], dict[str, object]]:
    """Every token of the text but the first of each window, from those before it in the window."""
    from quire.core.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=num_top)

    async def work(engine: AsyncEngine) -> tuple[list[Prediction], dict[str, object]]:
        ids = (await engine.encode(content, add_special_tokens=False))[:num_tokens]
        size = window - 1  # the engine wants room for one token of output
        windows = [ids[start : start + size] for start in range(0, len(ids), size)]
        windows = [part for part in windows if len(part) > 1]
        if not windows:
            raise ConfigError("the text has fewer than two tokens: there is nothing to predict")
        found: list[Prediction] = []
        for part in windows:
            # One at a time: the records of many windows at once would fill the memory.
            (output,) = (await run_batch(engine, [part], params)).outputs
            shown = (output.prompt_logprobs or [])[1:]
            found += [
                _prediction(token, seen)
                for token, seen in zip(part[1:], shown, strict=True)
                if seen is not None
            ]
        return found, dict(engine_setup(engine.facts))

    return run_engine(config, work)


def _prediction(token: int, seen: TokenLogprobs) -> Prediction:
    return Prediction(seen[token].logprob, {name: entry.logprob for name, entry in seen.items()})
