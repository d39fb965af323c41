"""What the sampler needs of a step, prepared on the host: arrays to upload, and facts.

Only what some row asks for is prepared: a step of greedy rows uploads nothing for its sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quire.core.worker import sampling_settings as settings_of
from quire.core.worker.input_batch import InputBatch
from quire.core.worker.random_numbers import uniform
from quire.core.worker.request_state import RequestState
from quire.core.worker.step_arrays import Array, Int64s


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomRow:
    """One row that custom processors change."""

    row: int
    request_id: str
    names: tuple[str, ...]
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]


@dataclass(slots=True, kw_only=True)
class SamplingArrays:
    """Arrays by name, and facts about the R rows that are sampled."""

    num_rows: int
    """R, padding included."""
    arrays: dict[str, Array] = field(default_factory=dict)
    is_all_greedy: bool = True
    needs_filter: bool = False
    custom_rows: list[CustomRow] = field(default_factory=list)
    logprob_rows: Int64s = field(default_factory=lambda: np.empty(0, np.int64))
    """Rows that want log-probabilities."""
    num_top: int = 0
    """The most that any of them wants."""
    is_always_same: bool = False
    """No row asks for anything: the sampling of these rows is the same in each step."""

    @property
    def may_forbid_all(self) -> bool:
        """Whether a row could be left without any token."""
        forbidding = ("bias", "keep_rows", "mask_rows")
        return bool(self.custom_rows) or any(name in self.arrays for name in forbidding)


def make_sampling_arrays(
    requests: InputBatch, rows: Int64s, num_rows: int, places: Int64s | None = None
) -> SamplingArrays:
    """Prepares the sampling of `rows` of the batch, padded with greedy rows to `num_rows`.

    `places`: how many guessed tokens stand before each; None: none.
    """
    features = requests.settings.features[rows]
    union = int(np.bitwise_or.reduce(features)) if len(rows) else 0
    sampling = SamplingArrays(num_rows=num_rows, is_always_same=not union)
    if union & settings_of.SAMPLES:
        indices = requests.output_indices(rows)
        indices = indices if places is None else indices + places
        has_filter = bool(union & settings_of.FILTERS)
        _add_settings(sampling, requests, rows, indices, has_filter=has_filter)
    if union & ~(settings_of.SAMPLES | settings_of.FILTERS | settings_of.PROMPT_LOGPROBS):
        _add_features(sampling, requests, rows, features)
    return sampling


def add_token_masks(
    sampling: SamplingArrays, request_ids: Sequence[str], masks: Mapping[str, bytes]
) -> None:
    """Adds the masks of those of the sampled requests that have one; they come in row order."""
    chosen = [(row, masks[name]) for row, name in enumerate(request_ids) if name in masks]
    if not chosen:
        return
    words = [np.frombuffer(mask, dtype="<i4") for _, mask in chosen]
    sampling.arrays |= {
        "mask_rows": np.array([row for row, _ in chosen], np.int64),
        "mask": np.stack(words).astype(np.int32, copy=False),
    }


def _add_settings(
    sampling: SamplingArrays,
    requests: InputBatch,
    rows: Int64s,
    indices: Int64s,
    *,
    has_filter: bool,
) -> None:
    columns = requests.settings.gather(rows, sampling.num_rows)
    numbers = np.zeros(sampling.num_rows, np.float32)
    numbers[: len(rows)] = uniform(columns.seeds, indices)
    sampling.arrays |= {"temperature": columns.temperature, "uniform": numbers}
    if has_filter:
        sampling.arrays |= {
            "top_k": columns.top_k,
            "top_p": columns.top_p,
            "min_p": columns.min_p,
        }
    sampling.is_all_greedy = False
    sampling.needs_filter = has_filter


def _add_features(
    sampling: SamplingArrays, requests: InputBatch, rows: Int64s, features: npt.NDArray[np.uint16]
) -> None:
    states = requests.states(rows)
    chosen = {
        bit: np.flatnonzero(features & bit)
        for bit in (
            settings_of.PROCESSES,
            settings_of.KEEPS,
            settings_of.BIASES,
            settings_of.PENALISES,
            settings_of.LOGPROBS,
        )
    }
    sampling.custom_rows = [
        _custom_row(row, states[row]) for row in chosen[settings_of.PROCESSES].tolist()
    ]
    _add_kept(sampling, [(row, states[row]) for row in chosen[settings_of.KEEPS].tolist()])
    _add_biases(sampling, [(row, states[row]) for row in chosen[settings_of.BIASES].tolist()])
    penalised = chosen[settings_of.PENALISES]
    if len(penalised):
        _add_penalties(sampling, [(row, states[row]) for row in penalised.tolist()])
        table = np.tile(np.array([1, 0, 0], np.float32), (sampling.num_rows, 1))
        table[penalised] = requests.settings.penalties[rows[penalised]]
        sampling.arrays["penalty_settings"] = table
    wanted = chosen[settings_of.LOGPROBS]
    if len(wanted):
        sampling.logprob_rows = wanted
        sampling.num_top = max(states[row].sampling.num_logprobs or 0 for row in wanted.tolist())
        sampling.arrays["logprob_rows"] = wanted


def _custom_row(row: int, state: RequestState) -> CustomRow:
    return CustomRow(
        row=row,
        request_id=state.request_id,
        names=state.sampling.logits_processors,
        prompt_ids=state.prompt_ids,
        output_ids=state.output_ids(),
    )


def _add_kept(sampling: SamplingArrays, chosen: list[tuple[int, RequestState]]) -> None:
    if not chosen:
        return
    rows = np.array([row for row, _ in chosen], np.int64)
    sampling.arrays |= {
        "keep_rows": rows,
        "keep_row_of_entry": np.repeat(rows, [len(state.allowed_ids) for _, state in chosen]),
        "keep_token_ids": np.concatenate([state.allowed_ids for _, state in chosen]),
    }


def _add_biases(sampling: SamplingArrays, chosen: list[tuple[int, RequestState]]) -> None:
    biases = [_biases(state) for _, state in chosen]
    if not sum(len(ids) for ids, _ in biases):
        return
    rows = np.array([row for row, _ in chosen], np.int64)
    sampling.arrays |= {
        "bias_rows": np.repeat(rows, [len(ids) for ids, _ in biases]),
        "bias_token_ids": np.concatenate([ids for ids, _ in biases]),
        "bias": np.concatenate([values for _, values in biases]),
    }


def _biases(state: RequestState) -> tuple[Int64s, npt.NDArray[np.float32]]:
    """The tokens of a row to which something is added now, and what: -inf for a forbidden one."""
    spec = state.sampling
    forbidden = {word[-1] for word, prefix in state.bad_words if state.ends_with(prefix)}
    if state.num_output_tokens < spec.min_tokens:
        forbidden.update(spec.min_tokens_forbids)
    if not forbidden:
        return state.bias_ids, state.bias
    forbidden_ids = np.array(sorted(forbidden), np.int64)
    others = ~np.isin(state.bias_ids, forbidden_ids)
    values = np.full(len(forbidden_ids), -np.inf, np.float32)
    return (
        np.concatenate([state.bias_ids[others], forbidden_ids]),
        np.concatenate([state.bias[others], values]),
    )


def _add_penalties(sampling: SamplingArrays, chosen: list[tuple[int, RequestState]]) -> None:
    seen = [state.seen for _, state in chosen if state.seen is not None]
    assert len(seen) == len(chosen), chosen
    rows = np.array([row for row, _ in chosen], np.int64)
    sampling.arrays |= {
        "penalty_rows": np.repeat(rows, [len(tokens.token_ids) for tokens in seen]),
        "penalty_token_ids": np.concatenate([tokens.token_ids for tokens in seen]),
        "penalty_counts": np.concatenate([tokens.output_counts for tokens in seen]),
    }
