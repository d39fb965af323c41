"""Level 1: how a token is chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.conformance.buffers import check_all, guard_all
from quire.conformance.cases import check
from quire.conformance.oracles import logits as oracle
from quire.conformance.trial import Trial
from quire.core.interface import SamplingTensors

Array = npt.NDArray[Any]
_SLACK = 4e-6
"""What float32 probabilities and their sums may be off by: 64 u."""
_V = {"v50": {"vocabulary": 50}, "v300": {"vocabulary": 300}, "v1000": {"vocabulary": 1000}}
_FIELDS = ("temperature", "top_k", "top_p", "min_p", "uniform")


def _settings(trial: Trial, rows: int, vocabulary: int, **given: Any) -> dict[str, Array]:
    columns: dict[str, Array] = {
        "temperature": np.full(rows, 1.0),
        "top_k": np.full(rows, vocabulary),
        "top_p": np.full(rows, 1.0),
        "min_p": np.zeros(rows),
        "uniform": (trial.rng.integers(0, 1 << 24, rows) * 2.0**-24),
    }
    for name, value in given.items():
        columns[name] = np.broadcast_to(np.asarray(value), (rows,))
    return {
        name: np.asarray(column, dtype=np.int64 if name == "top_k" else np.float32)
        for name, column in columns.items()
    }


def _sample(trial: Trial, logits: Array, settings: dict[str, Array]) -> list[int]:
    host = {"logits": torch.from_numpy(logits.astype(np.float32))} | {
        name: torch.from_numpy(column.copy()) for name, column in settings.items()
    }
    guarded = guard_all(host, str(trial.device.torch_device))
    tensors = {name: buffer.view for name, buffer in guarded.items()}
    limits = (
        (settings["top_k"] < logits.shape[1]) | (settings["top_p"] < 1) | (settings["min_p"] > 0)
    )
    record = SamplingTensors(
        **{name: tensors[name] for name in _FIELDS},
        is_all_greedy=bool((settings["temperature"] == 0).all()),
        needs_filter=bool(limits.any()),
    )
    ops = trial.device.ops()
    tokens = ops.sample(tensors["logits"], record)
    trial.device.synchronize()
    trial.provider = ops.provider("sample")
    check_all(guarded, writes={"logits"})
    trial.require(
        tokens.dtype is torch.int64 and tuple(tokens.shape) == (len(logits),),
        f"sample returned {tokens.dtype} {tuple(tokens.shape)}, not int64 [{len(logits)}]",
    )
    return [int(token) for token in tokens.cpu()]


def _row(settings: dict[str, Array], row: int) -> oracle.RowSettings:
    values = {name: float(settings[name][row]) for name in _FIELDS if name != "top_k"}
    return oracle.RowSettings(top_k=int(settings["top_k"][row]), **values)


def _hold(trial: Trial, logits: Array, settings: dict[str, Array], hint: str) -> None:
    logits = logits.astype(np.float32).astype(np.float64)
    tokens = _sample(trial, logits, settings)
    for row, token in enumerate(tokens):
        one = _row(settings, row)
        possible = oracle.admissible(logits[row], one, _SLACK)
        trial.require(
            token in possible,
            f"sample chose token {token} in row {row}; only {sorted(possible)} is right for its "
            f"random number and {one}. {hint}",
        )


def _logits(trial: Trial, rows: int, vocabulary: int) -> Array:
    return np.asarray(trial.rng.standard_normal((rows, vocabulary)) * 3)


@check(level=1, op="sample", over=_V)
def greedy(trial: Trial, *, vocabulary: int) -> None:
    """Temperature 0 takes the largest logit and ignores every other setting."""
    logits = _logits(trial, 6, vocabulary)
    settings = _settings(trial, 6, vocabulary, temperature=0.0)
    _hold(trial, logits, settings, "Temperature 0 is greedy.")


@check(level=1, op="sample", over=_V)
def greedy_ties(trial: Trial, *, vocabulary: int) -> None:
    """Of equal largest logits the lowest id is taken."""
    logits = _logits(trial, 6, vocabulary)
    for row in range(6):
        tied = trial.rng.permutation(vocabulary)[: 2 + row]
        logits[row, tied] = 20.0
    settings = _settings(trial, 6, vocabulary, temperature=0.0)
    _hold(trial, logits, settings, "Ties go to the lowest id.")


@check(level=1, op="sample", over=_V)
def greedy_from_the_head(trial: Trial, *, vocabulary: int) -> None:
    """`most_likely`, where it is offered, takes the largest logit and marks rows without one.

    Where it is not, it says so and writes nothing.
    """
    logits = _logits(trial, 8, vocabulary)
    for row in range(4):
        logits[row, trial.rng.permutation(vocabulary)[: 2 + row]] = 20.0
    logits[4, vocabulary // 2] = np.nan
    logits[5], logits[6, 1] = -np.inf, np.inf
    logits[7, : vocabulary - 1] = -np.inf
    expected = [int(np.argmax(row)) for row in logits[:4]] + [0, 0, 0, vocabulary - 1]
    is_broken = [False] * 4 + [True] * 3 + [False]
    where = str(trial.device.torch_device)
    for name in trial.capabilities.dtypes:
        dtype = getattr(torch, name)
        host = torch.from_numpy(logits).to(dtype)
        out = torch.full((8,), -1, dtype=torch.int64, device=where)
        marks = torch.zeros(8, dtype=torch.bool, device=where)
        is_offered = trial.device.ops().most_likely(host.to(where), out, marks)
        trial.device.synchronize()
        found, marked = out.cpu().tolist(), marks.cpu().tolist()
        if not is_offered:
            trial.require(
                found == [-1] * 8 and not any(marked),
                f"most_likely in {name} says that it is not offered, and wrote {found}, {marked}",
            )
            continue
        trial.require(
            (found, marked) == (_greedy_of(host, expected), is_broken),
            f"most_likely in {name} gave {found} and marked {marked}; right is "
            f"{_greedy_of(host, expected)} and {is_broken}. Ties go to the lowest id.",
        )


def _greedy_of(logits: torch.Tensor, expected: list[int]) -> list[int]:
    """What is right after rounding, which makes ties: rows without a number keep `expected`."""
    rounded = logits.double().numpy()
    return [
        int(np.argmax(row)) if np.isfinite(row.max()) else wanted
        for row, wanted in zip(rounded, expected, strict=True)
    ]


@check(level=1, op="sample", over=_V)
def draws(trial: Trial, *, vocabulary: int) -> None:
    """The token is the inverse of the cumulative distribution at the row's random number."""
    logits = _logits(trial, 40, vocabulary)
    temperature = trial.rng.uniform(0.4, 2.0, 40)
    settings = _settings(trial, 40, vocabulary, temperature=temperature)
    hint = "Is settings.uniform used, over the ids in their own order, after the temperature?"
    _hold(trial, logits, settings, hint)


@check(level=1, op="sample", over=_V)
def same_logits_new_uniform(trial: Trial, *, vocabulary: int) -> None:
    """The same logits with many random numbers give tokens in their frequencies."""
    logits = np.repeat(_logits(trial, 1, vocabulary), 64, axis=0)
    settings = _settings(trial, 64, vocabulary, uniform=(np.arange(64) + 0.5) / 64)
    _hold(trial, logits, settings, "The answer must follow settings.uniform.")


@check(level=1, op="sample", over=_V)
def extreme_uniform(trial: Trial, *, vocabulary: int) -> None:
    """The smallest and the largest random number fall on tokens that may be chosen."""
    logits = _logits(trial, 8, vocabulary)
    logits[:, :3] = -np.inf
    logits[:, -3:] = -np.inf
    uniform = np.array([0.0, 1 - 2.0**-24] * 4)
    settings = _settings(trial, 8, vocabulary, uniform=uniform, top_k=[5] * 4 + [vocabulary] * 4)
    _hold(trial, logits, settings, "Forbidden tokens have no probability.")


@check(level=1, op="sample", over=_V)
def top_k(trial: Trial, *, vocabulary: int) -> None:
    """Nothing beyond the k largest is ever chosen."""
    logits = _logits(trial, 40, vocabulary)
    settings = _settings(trial, 40, vocabulary, top_k=trial.rng.integers(1, 9, 40))
    _hold(trial, logits, settings, "top_k keeps exactly the k largest where none tie.")


@check(level=1, op="sample", over=_V)
def top_k_ties(trial: Trial, *, vocabulary: int) -> None:
    """All that tie with the last of the k largest stay in."""
    logits = np.full((48, vocabulary), -9.0)
    for row in range(48):
        logits[row, trial.rng.permutation(vocabulary)[:6]] = (3.0, 2.0, 1.0, 1.0, 1.0, 0.5)
    uniform = (np.arange(48) + 0.5) / 48
    settings = _settings(trial, 48, vocabulary, top_k=3, uniform=uniform)
    _hold(trial, logits, settings, "Tokens that tie with the k-th are kept.")


@check(level=1, op="sample", over=_V)
def top_p(trial: Trial, *, vocabulary: int) -> None:
    """The nucleus is the smallest set that reaches top_p: one token more or less is wrong."""
    logits = _logits(trial, 64, vocabulary)
    limits = trial.rng.uniform(0.05, 0.95, 64)
    uniform = np.where(np.arange(64) % 2, 0.999, trial.rng.uniform(0, 1, 64))
    settings = _settings(trial, 64, vocabulary, top_p=limits, uniform=uniform)
    _hold(trial, logits, settings, "The token that makes the sum reach top_p is in the set.")


@check(level=1, op="sample", over=_V)
def min_p(trial: Trial, *, vocabulary: int) -> None:
    """Nothing below min_p times the largest probability is chosen."""
    logits = _logits(trial, 40, vocabulary)
    settings = _settings(trial, 40, vocabulary, min_p=trial.rng.uniform(0.02, 0.6, 40))
    _hold(trial, logits, settings, "min_p is relative to the row's largest probability.")


@check(level=1, op="sample", over=_V)
def mixed_rows(trial: Trial, *, vocabulary: int) -> None:
    """Rows of every kind stand in one batch and do not touch each other."""
    rng, rows = trial.rng, 48
    kind = np.arange(rows) % 4
    settings = _settings(
        trial,
        rows,
        vocabulary,
        temperature=np.where(kind == 0, 0.0, rng.uniform(0.5, 1.5, rows)),
        top_k=np.where(kind == 1, rng.integers(1, 20, rows), vocabulary),
        top_p=np.where(kind == 2, rng.uniform(0.2, 0.9, rows), 1.0),
        min_p=np.where(kind == 3, rng.uniform(0.05, 0.3, rows), 0.0),
    )
    _hold(trial, _logits(trial, rows, vocabulary), settings, "Each row has its own settings.")


@check(level=1, op="sample", over=_V)
def all_filters(trial: Trial, *, vocabulary: int) -> None:
    """top_k, then top_p of what is left, renormalised, then min_p."""
    rng = trial.rng
    settings = _settings(
        trial,
        48,
        vocabulary,
        top_k=rng.integers(3, 20, 48),
        top_p=rng.uniform(0.3, 0.9, 48),
        min_p=rng.uniform(0.01, 0.1, 48),
    )
    _hold(trial, _logits(trial, 48, vocabulary), settings, "In this order: k, p, min_p.")
