"""The sampling settings of the running requests, as columns: a step gathers its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from quire.core.interface import SamplingSpec

_Number = TypeVar("_Number", bound=np.generic)

SAMPLES = 1
"""Not greedy."""
FILTERS = 2
"""top_k, top_p or min_p."""
PENALISES = 4
BIASES = 8
"""logit_bias, bad words or min_tokens."""
KEEPS = 16
"""allowed_token_ids."""
PROCESSES = 32
"""Custom processors."""
LOGPROBS = 64
PROMPT_LOGPROBS = 128
READS_HISTORY = 256
"""Needs the values of the tokens sampled so far on the host."""

MIN_TEMPERATURE = 1e-5
"""Below it a row is greedy: dividing by less takes logits out of float32's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingColumns:
    """Settings of R sampled rows, gathered for one step."""

    temperature: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    seeds: npt.NDArray[np.uint64]


class SamplingSettings:
    """Columns with a row for each request that the worker remembers."""

    def __init__(self, capacity: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.features = np.zeros(capacity, np.uint16)
        """Which of the constants of this module a row has."""
        self._temperature = np.zeros(capacity, np.float32)
        self._top_k = np.zeros(capacity, np.int64)
        self._top_p = np.ones(capacity, np.float32)
        self._min_p = np.zeros(capacity, np.float32)
        self._seeds = np.zeros(capacity, np.uint64)
        self.penalties = np.zeros((capacity, 3), np.float32)
        """(repetition, frequency, presence)."""

    def set(self, row: int, spec: SamplingSpec) -> None:
        """Writes one request's settings."""
        is_greedy = spec.temperature < MIN_TEMPERATURE
        has_top_k = 0 < spec.top_k < self._vocab_size
        self._temperature[row] = 0.0 if is_greedy else spec.temperature
        self._top_k[row] = spec.top_k if has_top_k else self._vocab_size
        self._top_p[row] = spec.top_p
        self._min_p[row] = spec.min_p
        self._seeds[row] = spec.seed & 0xFFFFFFFFFFFFFFFF
        self.penalties[row] = (
            spec.repetition_penalty,
            spec.frequency_penalty,
            spec.presence_penalty,
        )
        has_filter = not is_greedy and (has_top_k or spec.top_p < 1.0 or spec.min_p > 0.0)
        self.features[row] = _features(spec) | (not is_greedy) * SAMPLES | has_filter * FILTERS

    def gather(self, rows: npt.NDArray[np.int64], num_rows: int) -> SamplingColumns:
        """The settings of `rows`, then greedy ones up to `num_rows`."""
        return SamplingColumns(
            temperature=_padded(self._temperature[rows], num_rows, 0.0),
            top_k=_padded(self._top_k[rows], num_rows, self._vocab_size),
            top_p=_padded(self._top_p[rows], num_rows, 1.0),
            min_p=_padded(self._min_p[rows], num_rows, 0.0),
            seeds=self._seeds[rows],
        )


def _features(spec: SamplingSpec) -> int:
    biases = spec.logit_bias or spec.bad_words or (spec.min_tokens and spec.min_tokens_forbids)
    reads = spec.has_penalties or spec.logits_processors or _needs_prefix(spec)
    return (
        spec.has_penalties * PENALISES
        | bool(biases) * BIASES
        | (spec.allowed_token_ids is not None) * KEEPS
        | bool(spec.logits_processors) * PROCESSES
        | (spec.num_logprobs is not None) * LOGPROBS
        | (spec.num_prompt_logprobs is not None) * PROMPT_LOGPROBS
        | bool(reads) * READS_HISTORY
    )


def _needs_prefix(spec: SamplingSpec) -> bool:
    return any(len(word) > 1 for word in spec.bad_words)


def _padded(column: npt.NDArray[_Number], num_rows: int, value: float) -> npt.NDArray[_Number]:
    missing = num_rows - len(column)
    if not missing:
        return column
    return np.concatenate([column, np.full(missing, value, column.dtype)])
