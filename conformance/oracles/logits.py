"""What happens between logits and tokens, by the docstrings of `Ops`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def apply_penalties(
    logits: Array, rows: Array, token_ids: Array, output_counts: Array, settings: Array
) -> Array:
    """The penalised logits [R, V], entry by entry.

    Source: Keskar et al. 2019, section 4.1 (repetition); OpenAI's API reference, "frequency and
    presence penalties".
    """
    changed = logits.copy()
    for row, token, count in zip(rows, token_ids, output_counts, strict=True):
        repetition, frequency, presence = settings[row]
        value = changed[row, token]
        value = value / repetition if value > 0 else value * repetition
        value = value - frequency * count
        changed[row, token] = value - presence if count > 0 else value
    return changed


def add_bias(logits: Array, rows: Array, token_ids: Array, bias: Array) -> Array:
    """The logits [R, V] with bias[m] added at (rows[m], token_ids[m])."""
    changed = logits.copy()
    for row, token, value in zip(rows, token_ids, bias, strict=True):
        changed[row, token] += value
    return changed


def keep_only(logits: Array, rows: Array, row_of_entry: Array, token_ids: Array) -> Array:
    """The logits [R, V] with -inf in `rows` but at the entries."""
    changed = logits.copy()
    changed[rows] = -np.inf
    changed[row_of_entry, token_ids] = logits[row_of_entry, token_ids]
    return changed


def apply_token_mask(logits: Array, rows: Array, mask: Array) -> Array:
    """The logits [R, V] with -inf where the row's bit of a token is 0."""
    changed = logits.copy()
    for row, words in zip(rows, mask, strict=True):
        for token in range(logits.shape[-1]):
            if not (int(words[token // 32]) >> (token % 32)) & 1:
                changed[row, token] = -np.inf
    return changed


def logprobs(logits: Array, token_ids: Array, num_top: int) -> tuple[Array, Array, Array, Array]:
    """(selected [R], ranks [R], top_ids [R, n], top_logprobs [R, n]) of log_softmax(logits)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    every = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    selected = every[np.arange(len(logits)), token_ids]
    chosen = logits[np.arange(len(logits)), token_ids]
    ranks = (logits > chosen[:, None]).sum(axis=-1) + 1
    top_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :num_top]
    return selected, ranks, top_ids, np.take_along_axis(every, top_ids, axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """How one row is sampled; the fields of `SamplingTensors`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    uniform: float


def kept_tokens(logits: Array, settings: RowSettings) -> set[int]:
    """The ids of logits [V] that top-k, top-p and min-p leave.

    Source: Fan et al. 2018 (top-k), Holtzman et al. 2019 (top-p), Nguyen et al. 2024 (min-p).
    """
    probabilities = _softmax(logits / settings.temperature)
    order = np.argsort(-logits, kind="stable")
    last = logits[order[min(settings.top_k, len(logits)) - 1]]
    order = order[logits[order] >= last]
    total = probabilities[order].sum()
    kept: list[int] = []
    mass = 0.0
    for token in order:
        if kept and settings.top_p < 1 and mass >= settings.top_p * total:
            break
        kept.append(int(token))
        mass += probabilities[token]
    least = settings.min_p * probabilities.max()
    return {token for token in kept if probabilities[token] >= least}


def sample(logits: Array, settings: RowSettings) -> int:
    """The token of one row, logits [V], by inverting the running sum in the order of ids."""
    if settings.temperature == 0:
        return int(logits.argmax())
    kept = kept_tokens(logits, settings)
    probabilities = _softmax(logits / settings.temperature)
    weights = np.array([p if token in kept else 0.0 for token, p in enumerate(probabilities)])
    running = weights.cumsum()
    above = np.flatnonzero(running > settings.uniform * running[-1])
    return int(above[0]) if len(above) else max(kept)


def admissible(logits: Array, settings: RowSettings, slack: float) -> set[int]:
    """Every token that a row may give when its probabilities are known to `slack` alone.

    In float32 a sum that meets a limit within rounding may fall on either side of it.
    """
    if settings.temperature == 0:
        return {sample(logits, settings)}
    answers = set()
    for du, dp, dm in itertools.product((-slack, 0.0, slack), repeat=3):
        moved = RowSettings(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p if settings.top_p >= 1 else settings.top_p + dp,
            min_p=max(0.0, settings.min_p * (1 + dm)),
            uniform=min(max(0.0, settings.uniform + du), 1 - 1e-9),
        )
        answers.add(sample(logits, moved))
    return answers


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())
