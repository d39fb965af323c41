"""Finds the numbers of a launch table by trying: tiles, warps, stages and splits, timed.

A candidate changes one number of one row. What is timed is the host function that the row serves,
so that a table is tuned as it will be used; `quire.kernels_triton.tuning_work` says on what. A row
is descended one number after the other until none helps: each candidate is compiled, and all
combinations of them would take hours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from quire.kernels_triton.launch import DeviceLauncher, LaunchEntry, LaunchTable
from quire.kernels_triton.tuning_work import Work

Timer = Callable[[Callable[[], None]], Sequence[float]]
"""Seconds of each of several calls, the device awaited."""

_TILES = {"BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64, 128)}
_LATENT = {"BLOCK_M": (16, 32, 64), "BLOCK_N": (16, 32, 64), "SLICE": (0, 64, 128)}
_CHOICES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "rms_norm": {"TILE": (1024, 4096, 16384)},
    "gated_activation": {"TILE": (512, 1024, 4096)},
    "prefill": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128)},
    "decode": {"BLOCK_N": (16, 32, 64, 128)},
    "splits": {"PROGRAMS_PER_UNIT": (1, 2, 4, 8), "MIN_TOKENS": (128, 256, 512, 1024)},
    "latent_prefill": _LATENT,
    "latent_decode": _LATENT,
    "experts_up": {"BLOCK_M": (16, 32, 64, 128), **_TILES},
    "experts_down": _TILES,
    "quantized_linear": {"BLOCK_M": (16, 32, 64), **_TILES},
    "float8_linear": {"BLOCK_M": (16, 32, 64, 128), **_TILES},
}
"""What may be tried of each kernel's constants."""
_OPTIONS: Mapping[str, tuple[int, ...]] = {"num_warps": (2, 4, 8), "num_stages": (1, 2, 3, 4)}
"""And of the compiler's options, where the row has them."""
_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate and what it took."""

    kernel: str
    when: Mapping[str, Any]
    constants: Mapping[str, int]
    options: Mapping[str, int]
    seconds: float | None
    """The sum of the medians of what the row is timed on; None: it could not run."""
    is_chosen: bool = False


@dataclass(slots=True, kw_only=True)
class Tuning:
    """What came of it."""

    table: LaunchTable
    trials: list[Trial] = field(default_factory=list)
    tuned: list[str] = field(default_factory=list)
    """Labels of the work that rows were tuned on."""
    untried: list[str] = field(default_factory=list)
    """Work for which no time or no memory was left, and no candidate that runs."""


def tune(
    table: LaunchTable,
    works: Iterable[Work],
    time: Timer,
    *,
    limit: int = 0,
    is_over: Callable[[], bool] = lambda: False,
) -> Tuning:
    """The table with the fastest candidate found for each row that has work, and every trial.

    `limit` candidates a row at most, 0: all. A candidate that cannot run is left out and noted.
    Work that begins when `is_over` says so is left untried and named. Later work is timed with
    the rows found for earlier work.
    """
    tuning = Tuning(table=table)
    for work in works:
        _tune_row(tuning, work, time, limit, is_over)
    return tuning


def _tune_row(
    tuning: Tuning, work: Work, time: Timer, limit: int, is_over: Callable[[], bool]
) -> None:
    table = tuning.table
    entry = table.find(work.kernel, work.facts)
    number = next(i for i, row in enumerate(table.entries) if row is entry)

    def score(candidate: LaunchEntry) -> Sequence[float] | None:
        entries = (*table.entries[:number], candidate, *table.entries[number + 1 :])
        return _time(replace(table, entries=entries), runs, time)

    try:
        runs = [] if is_over() else work.make()
    except Exception:  # a device has less memory than the work needs
        runs = []
    search = _Search(entry, score, limit, is_over)
    best = search.descend() if runs else None
    tuning.trials += search.trials(best)
    if best is None:
        tuning.untried.append(work.label)
        return
    tuning.tuned.append(work.label)
    entries = (*table.entries[:number], best, *table.entries[number + 1 :])
    tuning.table = replace(table, entries=entries)


class _Search:
    """One row's candidates, each tried once."""

    def __init__(
        self,
        entry: LaunchEntry,
        score: Callable[[LaunchEntry], Sequence[float] | None],
        limit: int,
        is_over: Callable[[], bool],
    ) -> None:
        self._entry, self._score = entry, score
        self._limit, self._is_over = limit, is_over
        self._tried: list[tuple[LaunchEntry, Sequence[float] | None]] = []

    def descend(self) -> LaunchEntry | None:
        """The best row found; None if none could run."""
        best, cost = self._entry, self._cost(self._entry)
        for _ in range(_ROUNDS):
            before = best
            for name, values in _axes(self._entry):
                for candidate in _along(best, name, values):
                    if self._is_tried(candidate) or self._ends():
                        continue
                    found = self._cost(candidate)
                    if found < cost:
                        best, cost = candidate, found
            if best == before:
                break
        return None if cost == math.inf else best

    def trials(self, best: LaunchEntry | None) -> Iterator[Trial]:
        """What was tried, in order."""
        for entry, seconds in self._tried:
            yield Trial(
                kernel=entry.kernel,
                when=entry.when,
                constants=entry.constants,
                options=entry.options,
                seconds=None if seconds is None else sum(seconds),
                is_chosen=entry == best,
            )

    def _ends(self) -> bool:
        return bool(self._limit and len(self._tried) >= self._limit) or self._is_over()

    def _is_tried(self, entry: LaunchEntry) -> bool:
        return any(entry == other for other, _ in self._tried)

    def _cost(self, entry: LaunchEntry) -> float:
        """The sum of logarithms: each of a row's shapes counts by its share, not by its length."""
        seconds = self._score(entry)
        self._tried.append((entry, seconds))
        return math.inf if seconds is None else sum(math.log(max(s, 1e-12)) for s in seconds)


def _axes(entry: LaunchEntry) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _CHOICES.get(entry.kernel, {}).items()
    yield from ((name, values) for name, values in _OPTIONS.items() if name in entry.options)


def _along(entry: LaunchEntry, name: str, values: Sequence[int]) -> Iterator[LaunchEntry]:
    for value in values:
        if name in _OPTIONS:
            yield replace(entry, options={**entry.options, name: value})
        else:
            yield replace(entry, constants={**entry.constants, name: value})


def _time(
    table: LaunchTable, runs: Sequence[Callable[[DeviceLauncher], None]], time: Timer
) -> Sequence[float] | None:
    launcher = DeviceLauncher(table)
    seconds = []
    for run in runs:
        try:
            seconds.append(median(time(partial(run, launcher))))
        except Exception:  # a compiler raises anything for a tile that does not fit
            return None
    return seconds


def write_table(tuning: Tuning, path: Path, provenance: Mapping[str, str]) -> None:
    """Writes the table with where its numbers come from, and the trials beside it.

    The provenance also says which rows were tuned, and where the others come from.
    """
    table = tuning.table
    rows = [
        {name: value for name, value in asdict(entry).items() if value or name == "kernel"}
        for entry in table.entries
    ]
    origin = {
        **provenance,
        "tuned": "; ".join(tuning.tuned) or "nothing",
        "others": f"table {table.architecture}: {table.provenance['method']}",
    }
    data = {
        "architecture": table.architecture,
        "provenance": origin,
        "facts": dict(table.facts),
        "entries": rows,
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = json.dumps([asdict(trial) for trial in tuning.trials], indent=1)
    path.with_suffix(".trials.json").write_text(text + "\n", encoding="utf-8")
