"""The sampling of one step: what its rows ask for, put into arrays; what no row asks for is not.

In this order: allowed tokens, grammar masks, bad words and min_tokens; biases; penalties; then the
draw. Log-probabilities are those of the model's own logits, before any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from quire.core.interface import PositionLogprobs
from quire_jax import sampling
from quire_jax.random_numbers import uniform
from quire_jax.requests import RequestState

Numbers = npt.NDArray[Any]
Put = Callable[[Any], Any]
"""Host arrays to the device."""

_MOST_BIAS = 1e30
"""A larger bias adds no certainty, and infinity would leave nothing finite to choose."""
_MIN_TEMPERATURE = 1e-5
"""Below it a row is greedy: dividing by less takes logits out of float32's range."""
_SMALLEST_LIST = 64

BROKEN = (
    "the model's logits have no finite largest value (NaN or infinity); "
    "check the weights, or use a dtype with more range"
)
EMPTY = (
    "no token is left to choose: allowed_token_ids, bad_words, min_tokens and logit_bias together "
    "forbid all of them; loosen one"
)


@dataclass(slots=True, kw_only=True)
class Sampled:
    """What came of the rows that were sampled."""

    tokens: list[int]
    """One a row; 0 where there is a problem."""
    problems: dict[int, str] = field(default_factory=dict)
    """Row to what is wrong with it."""
    logprobs: dict[int, PositionLogprobs] = field(default_factory=dict)
    """Of the rows that asked."""


def run_sampling(
    logits: jax.Array, states: Sequence[RequestState], masks: Mapping[str, bytes], put: Put
) -> Sampled:
    """Chooses a token for each of `states` from logits float32 [R, V]; further rows are padding."""
    num_rows, vocab_size = logits.shape
    greedy, is_sound = sampling.most_likely(logits)
    changed = _changed(logits, states, masks, put)
    settings = _settings(states, num_rows, vocab_size)
    tokens, is_left = greedy, is_sound
    if changed is not logits:
        tokens, is_left = sampling.most_likely(changed)
    if settings["temperature"].any():
        tokens = sampling.sample(changed, put(settings), has_filter=_has_filter(states))
    chosen, sound, left = (np.asarray(a)[: len(states)] for a in (tokens, is_sound, is_left))
    found = Sampled(tokens=[int(t) if ok else 0 for t, ok in zip(chosen, left, strict=True)])
    for row in np.flatnonzero(~left):
        found.problems[int(row)] = EMPTY if sound[row] else BROKEN
    for row in np.flatnonzero(~sound):
        found.problems[int(row)], found.tokens[row] = BROKEN, 0
    wanted = {row: s.sampling.num_logprobs for row, s in enumerate(states)}
    asked = {row: number for row, number in wanted.items() if number is not None}
    if asked:
        entries = make_logprobs(logits, found.tokens, list(wanted.values()), put)
        found.logprobs = {row: entries[row] for row in asked}
    return found


def make_logprobs(
    logits: jax.Array, tokens: Sequence[int], num_tops: Sequence[int | None], put: Put
) -> list[PositionLogprobs]:
    """Log-probabilities of `tokens`, one for each of the first rows of logits [R, V]."""
    num_rows, vocab_size = logits.shape
    padded = np.zeros(num_rows, np.int32)
    padded[: len(tokens)] = tokens
    most = min(max(number or 0 for number in num_tops), vocab_size)
    num_top = min(1 << max(most - 1, 0).bit_length(), vocab_size)
    columns = sampling.logprobs(logits, put(padded), num_top=num_top)
    lists = [np.asarray(column).tolist() for column in columns]
    return [
        PositionLogprobs(
            token_id=token,
            logprob=logprob,
            rank=rank,
            top_ids=ids[: number or 0],
            top_logprobs=best[: number or 0],
        )
        for token, number, logprob, rank, ids, best in zip(tokens, num_tops, *lists, strict=False)
    ]


def _changed(
    logits: jax.Array, states: Sequence[RequestState], masks: Mapping[str, bytes], put: Put
) -> jax.Array:
    num_rows, vocab_size = logits.shape
    allowed = _allowed(states, masks, num_rows, vocab_size)
    if allowed is not None:
        logits = sampling.apply_mask(logits, put(allowed))
    biases = [(row, *pair) for row, s in enumerate(states) for pair in _biases(s).items()]
    if biases:
        rows, token_ids, values = _columns(biases, num_rows)
        logits = sampling.add_bias(logits, put(rows), put(token_ids), put(values))
    seen = [
        (row, token, float(count))
        for row, state in enumerate(states)
        if state.is_penalised
        for token, count in state.seen_counts().items()
    ]
    if seen:
        columns = [put(column) for column in _columns(seen, num_rows)]
        logits = sampling.apply_penalties(logits, *columns, put(_penalties(states, num_rows)))
    return logits


def _allowed(
    states: Sequence[RequestState], masks: Mapping[str, bytes], num_rows: int, vocab_size: int
) -> npt.NDArray[np.uint32] | None:
    """Bits of the tokens that each row may choose; None: every row may choose all."""
    num_words = -(-vocab_size // 32)
    words = np.full((num_rows, num_words), 0xFFFFFFFF, np.uint32)
    is_bound = False
    for row, state in enumerate(states):
        ids, forbidden = state.sampling.allowed_token_ids, state.forbidden_ids()
        if ids is not None or forbidden:
            bits = np.full(num_words * 32, ids is None)
            bits[list(ids or ())] = True
            bits[list(forbidden)] = False
            words[row] = np.packbits(bits, bitorder="little").view("<u4")
            is_bound = True
        if state.request_id in masks:
            words[row] &= np.frombuffer(masks[state.request_id], "<u4")
            is_bound = True
    return words if is_bound else None


def _biases(state: RequestState) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in state.sampling.logit_bias:
        biases[token] = min(biases.get(token, 0.0) + bias, _MOST_BIAS)
    return biases


def _columns(
    entries: Sequence[tuple[int, int, float]], num_rows: int
) -> tuple[Numbers, Numbers, Numbers]:
    """Rows, tokens and values, padded to a power of four so that XLA compiles few lengths."""
    size = _SMALLEST_LIST
    while size < len(entries):
        size *= 4
    rows, tokens = np.full(size, num_rows, np.int32), np.zeros(size, np.int32)
    values = np.zeros(size, np.float32)
    rows[: len(entries)], tokens[: len(entries)], values[: len(entries)] = zip(
        *entries, strict=True
    )
    return rows, tokens, values


def _penalties(states: Sequence[RequestState], num_rows: int) -> Numbers:
    settings = np.tile(np.array([1, 0, 0], np.float32), (num_rows, 1))
    for row, state in enumerate(states):
        spec = state.sampling
        settings[row] = spec.repetition_penalty, spec.frequency_penalty, spec.presence_penalty
    return settings


def _settings(states: Sequence[RequestState], num_rows: int, vocab_size: int) -> dict[str, Numbers]:
    """The columns of `SamplingTensors`; padding rows are greedy."""
    specs = [state.sampling for state in states]
    missing = num_rows - len(specs)
    temperatures = [s.temperature if s.temperature >= _MIN_TEMPERATURE else 0.0 for s in specs]
    top_ks = [s.top_k if 0 < s.top_k < vocab_size else vocab_size for s in specs]
    numbers = uniform([s.seed for s in specs], [state.num_output_tokens for state in states])
    return {
        "temperature": np.array([*temperatures, *[0.0] * missing], np.float32),
        "top_k": np.array([*top_ks, *[vocab_size] * missing], np.int32),
        "top_p": np.array([*[s.top_p for s in specs], *[1.0] * missing], np.float32),
        "min_p": np.array([*[s.min_p for s in specs], *[0.0] * missing], np.float32),
        "uniform": np.concatenate([numbers, np.zeros(missing, np.float32)]),
    }


def _has_filter(states: Sequence[RequestState]) -> bool:
    specs = (state.sampling for state in states)
    return any(s.top_k > 0 or s.top_p < 1.0 or s.min_p > 0.0 for s in specs)
