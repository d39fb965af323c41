"""Extension `speculation`: guesses make a step longer and change no token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quire.conformance.cases import check, dtypes, product
from quire.conformance.checks.l2_runner import running
from quire.conformance.stepping import GREEDY, Job
from quire.conformance.trial import Trial
from quire.core.interface import Capabilities, SamplingSpec

_LENGTHS = (19, 3, 40, 16)
_NUM_OUTPUT = 12
_GUESSERS: dict[str, dict[str, Any]] = {
    "right": {"wrong_at": None},
    "wrong": {"wrong_at": 0},
    "second_wrong": {"wrong_at": 1},
    "third_wrong": {"wrong_at": 2},
}
_SAMPLINGS = {
    "greedy": {"sampling": GREEDY},
    "seeded": {"sampling": SamplingSpec(temperature=0.9, seed=5, top_p=0.95)},
}


def _needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if "speculation" not in claims.features:
        return "the feature speculation is not claimed"
    if arguments["dtype"] not in claims.cache_dtypes:
        return f"cache dtype {arguments['dtype']} is not claimed"
    return ""


def _guesser(plain: Mapping[str, list[int]], wrong_at: int | None) -> Callable[[Job], list[int]]:
    """Guesses three tokens from what the plain run said, one of them spoilt."""

    def guess(job: Job) -> list[int]:
        begin = len(job.output)
        tokens = list(plain[job.request_id][begin : begin + 3])
        if wrong_at is not None and wrong_at < len(tokens):
            tokens[wrong_at] = (tokens[wrong_at] + 1) % 7 + 1
        return tokens

    return guess


@check(
    level=2,
    op="runner",
    over=product(_GUESSERS, _SAMPLINGS, dtypes("float32")),
    needs=_needs,
)
def changes_no_token(
    trial: Trial, *, wrong_at: int | None, sampling: SamplingSpec, dtype: str
) -> None:
    """With any guesses the tokens are those without; right guesses save steps."""
    with running(trial, dtype) as runner:
        prompts = {f"r{n}": runner.prompt(n) for n in _LENGTHS}

        def outputs(run: Callable[..., dict[str, list[int]]]) -> dict[str, list[int]]:
            return {name: list(tokens) for name, tokens in run().items()}

        def fresh() -> Any:
            steps = runner.steps()
            for name, prompt in prompts.items():
                steps.add(name, prompt, _NUM_OUTPUT, sampling)
            return steps

        plain_steps = fresh()
        plain = outputs(plain_steps.run)
        guessing = fresh()
        guessed = outputs(lambda: guessing.run_guessing(_guesser(plain, wrong_at)))
        for name, tokens in plain.items():
            trial.require(
                guessed[name] == tokens,
                f"request {name} says {guessed[name]} with guesses and {tokens} without: token "
                "number i takes random number i, a guess is kept only where the worker would have "
                "sampled it, and what refused guesses wrote to the cache is written again",
            )
        if wrong_at is None:
            saved = plain_steps.num_steps - guessing.num_steps
            trial.require(
                saved > 0,
                "right guesses saved no step: a request with guesses is sampled after each of them",
            )
