"""From what the device sent back to a StepResult."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.core.interface import PositionLogprobs, StepBatch, StepResult
from quire.core.worker.prompt_logprobs import PREFIX, PromptRows
from quire.core.worker.request_state import RequestState
from quire.core.worker.sampler import CustomFailures
from quire.core.worker.sampling_arrays import SamplingArrays
from quire.core.worker.step_arrays import Array

Arrays = Mapping[str, Array]

_BROKEN = (
    "the model's logits have no finite largest value (NaN or infinity); "
    "check the weights, or use a dtype with more range"
)
_EMPTY = (
    "no token is left to choose: allowed_token_ids, bad_words, min_tokens, logit_bias and custom "
    "processors together forbid all of them; loosen one"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutline:
    """What the host knows of a step before its result is back."""

    batch: StepBatch
    states: Sequence[RequestState]
    """Of the batch's requests, in its order."""
    sampled: Sequence[int]
    """Of each sampled row, its request: an index into the batch. A request with n guesses has n + 1
    rows in a run."""
    sampling: SamplingArrays
    prompt: PromptRows | None
    failures: CustomFailures = field(default_factory=CustomFailures)


def make_step_result(outline: StepOutline, arrays: Arrays, tokens: list[list[int]]) -> StepResult:
    """Puts the arrays of `Sampler.outputs` and `PromptRows.fields` into the columns of a result.

    `tokens`: what `accepted_tokens` says of the same step.
    """
    errors = _errors(outline, arrays)
    prompt_logprobs = _prompt_logprobs(outline, arrays)
    for request_id, entries in prompt_logprobs.items():
        if any(math.isnan(entry.logprob) for entry in entries):
            errors.setdefault(request_id, _BROKEN)
    batch = outline.batch
    if errors:
        tokens = [
            [] if name in errors else mine
            for name, mine in zip(batch.request_ids, tokens, strict=True)
        ]
        prompt_logprobs = {k: v for k, v in prompt_logprobs.items() if k not in errors}
    return StepResult(
        step_id=batch.step_id,
        sampled_token_ids=tokens,
        logprobs=_logprobs(outline, arrays, errors),
        prompt_logprobs=prompt_logprobs,
        errors=errors,
    )


def accepted_tokens(outline: StepOutline, sampled: Array) -> list[list[int]]:
    """For each request of the batch, its tokens up to the first that its guess had otherwise."""
    batch = outline.batch
    tokens: list[list[int]] = [[] for _ in batch.request_ids]
    for index, token in zip(outline.sampled, sampled.tolist(), strict=False):
        tokens[index].append(token)
    if not batch.draft_token_ids:
        return tokens
    for index, request_id in enumerate(batch.request_ids):
        guesses = batch.draft_token_ids.get(request_id)
        if guesses and tokens[index]:
            mine = tokens[index]
            num_right = 0
            while num_right < len(guesses) and mine[num_right] == guesses[num_right]:
                num_right += 1
            tokens[index] = mine[: num_right + 1]
    return tokens


def _errors(outline: StepOutline, arrays: Arrays) -> dict[str, str]:
    errors = {state.request_id: state.problem for state in outline.states if state.problem}
    errors.update(outline.failures.messages)
    for name, message in (("is_broken", _BROKEN), ("is_empty", _EMPTY)):
        if name in arrays and True in arrays[name].tolist():
            for row in np.flatnonzero(arrays[name][: len(outline.sampled)]).tolist():
                errors.setdefault(outline.states[outline.sampled[row]].request_id, message)
    return errors


def _logprobs(
    outline: StepOutline, arrays: Arrays, errors: Mapping[str, str]
) -> list[list[PositionLogprobs] | None] | None:
    asked = [state.sampling.num_logprobs for state in outline.states]
    if all(number is None for number in asked):
        return None
    columns: list[list[PositionLogprobs] | None] = [
        None if number is None else [] for number in asked
    ]
    if not len(outline.sampling.logprob_rows):
        return columns
    rows = outline.sampling.logprob_rows.tolist()
    entries = _entries(
        arrays,
        "",
        arrays["tokens"][outline.sampling.logprob_rows].tolist(),
        [asked[outline.sampled[row]] or 0 for row in rows],
    )
    for row, entry in zip(rows, entries, strict=True):
        index = outline.sampled[row]
        if outline.states[index].request_id not in errors:
            columns[index] = [entry]
    return columns


def _prompt_logprobs(outline: StepOutline, arrays: Arrays) -> dict[str, list[PositionLogprobs]]:
    prompt = outline.prompt
    if prompt is None:
        return {}
    num_tops = [part.num_top for part in prompt.parts for _ in range(part.begin, part.end)]
    entries = _entries(arrays, PREFIX, prompt.arrays["prompt_targets"].tolist(), num_tops)
    return {part.request_id: entries[part.begin : part.end] for part in prompt.parts}


def _entries(
    arrays: Arrays, prefix: str, tokens: Sequence[int], num_tops: Sequence[int]
) -> list[PositionLogprobs]:
    columns = [
        arrays[f"{prefix}{name}"].tolist()
        for name in ("selected", "ranks", "top_ids", "top_logprobs")
    ]
    return [
        PositionLogprobs(
            token_id=token, logprob=logprob, rank=rank, top_ids=ids[:n], top_logprobs=best[:n]
        )
        for token, n, logprob, rank, ids, best in zip(tokens, num_tops, *columns, strict=True)
    ]
