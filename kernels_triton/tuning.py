"""Finds the tile sizes of a launch table by trying: every candidate of every row, timed.

A candidate changes one row's constants and compiler options. What is timed is the host function
that the row serves, on tensors of the sizes below, so that a table is tuned as it will be used.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quire.kernels_triton import elementwise, norms, quantized
from quire.kernels_triton.launch import DeviceLauncher, LaunchEntry, LaunchTable

Timer = Callable[[Callable[[], None]], Sequence[float]]
"""Seconds of each of several calls, the device awaited."""

_WARPS = (2, 4, 8)
_CHOICES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "rms_norm": {"TILE": (1024, 4096, 16384)},
    "gated_activation": {"TILE": (512, 1024, 4096)},
    "quantized_linear": {"BLOCK_M": (16, 64), "BLOCK_N": (32, 64, 128), "BLOCK_K": (32, 64)},
}
"""What may be tried of each kernel's constants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate and what it took."""

    kernel: str
    when: Mapping[str, Any]
    constants: Mapping[str, int]
    options: Mapping[str, int]
    seconds: float | None
    """The median; None: it could not run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a row of a table is timed on."""

    kernel: str
    facts: Mapping[str, Any]
    run: Callable[[DeviceLauncher], None]


def candidates(entry: LaunchEntry, *, has_options: bool) -> Iterator[LaunchEntry]:
    """The row as it is, then every other choice of its constants and warps."""
    yield entry
    choices = _CHOICES.get(entry.kernel, {})
    warps = _WARPS if has_options else (0,)
    for *values, num_warps in itertools.product(*choices.values(), warps):
        constants = {**entry.constants, **dict(zip(choices, values, strict=True))}
        options = {**entry.options, "num_warps": num_warps} if has_options else entry.options
        changed = replace(entry, constants=constants, options=options)
        if changed != entry:
            yield changed


def tune(
    table: LaunchTable, device: str, time: Timer, *, is_dry: bool, limit: int = 0
) -> tuple[LaunchTable, list[Trial]]:
    """The table with the fastest candidate of each row that has work, and every trial.

    `limit` candidates a row at most, 0: all. A candidate that cannot run is left out and noted.
    """
    entries, trials = list(table.entries), []
    for work in _works(device, is_dry=is_dry):
        entry = table.find(work.kernel, work.facts)
        number = next(i for i, row in enumerate(table.entries) if row is entry)
        tried = list(candidates(entry, has_options=not is_dry))
        results = [
            (_time(table, number, one, work, time), one) for one in tried[: limit or len(tried)]
        ]
        trials += [
            Trial(
                kernel=one.kernel,
                when=one.when,
                constants=one.constants,
                options=one.options,
                seconds=seconds,
            )
            for seconds, one in results
        ]
        ran = [(seconds, i) for i, (seconds, _) in enumerate(results) if seconds is not None]
        if ran:
            entries[number] = results[min(ran)[1]][1]
    return replace(table, entries=tuple(entries)), trials


def _time(
    table: LaunchTable, number: int, entry: LaunchEntry, work: Work, time: Timer
) -> float | None:
    entries = (*table.entries[:number], entry, *table.entries[number + 1 :])
    launcher = DeviceLauncher(replace(table, entries=entries))
    try:
        return median(time(lambda: work.run(launcher)))
    except Exception:  # a compiler raises anything for a tile that does not fit
        return None


def write_table(
    table: LaunchTable, trials: Sequence[Trial], path: Path, provenance: Mapping[str, str]
) -> None:
    """Writes the table with where its numbers come from, and the trials beside it."""
    rows = [
        {name: value for name, value in asdict(entry).items() if value or name == "kernel"}
        for entry in table.entries
    ]
    data = {
        "architecture": table.architecture,
        "provenance": dict(provenance),
        "facts": dict(table.facts),
        "entries": rows,
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    text = json.dumps([asdict(trial) for trial in trials], indent=1)
    path.with_suffix(".trials.json").write_text(text + "\n", encoding="utf-8")


def _works(device: str, *, is_dry: bool) -> Iterator[Work]:
    """Decoded batches and prompts of a layer of 8B parameters; a dry run's are tiny."""
    dtype = torch.float32 if is_dry else torch.bfloat16
    for num_tokens, width in ((2, 48),) if is_dry else ((16, 4096), (4096, 4096)):

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        x, weight = draw(num_tokens, width), draw(width)
        gates, half = draw(num_tokens, 2 * width), draw(num_tokens, width)
        layer = _quantized(device, width, dtype)
        facts = {"item_size": x.element_size(), "rows": num_tokens, "bits": 8}
        yield Work(kernel="rms_norm", facts={"width": width}, run=_norm(x, weight))
        yield Work(kernel="gated_activation", facts={}, run=_gate(gates, half))
        yield Work(kernel="quantized_linear", facts=facts, run=_multiply(x, layer))


def _norm(x: Tensor, weight: Tensor) -> Callable[[DeviceLauncher], None]:
    out = torch.empty_like(x)
    return lambda launcher: norms.rms_norm(launcher, x, weight, 1e-6, out)


def _gate(gates: Tensor, out: Tensor) -> Callable[[DeviceLauncher], None]:
    return lambda launcher: elementwise.gated_activation(launcher, gates, "silu", out)


def _multiply(x: Tensor, layer: quantized.QuantizedLayer) -> Callable[[DeviceLauncher], None]:
    def run(launcher: DeviceLauncher) -> None:
        quantized.quantized_linear(launcher, x, layer)

    return run


def _quantized(device: str, width: int, dtype: torch.dtype) -> quantized.QuantizedLayer:
    codes = torch.randint(0, 256, (width, width), dtype=torch.uint8, device=device)
    return quantized.QuantizedLayer(
        bits=8,
        group_size=width,
        num_groups=1,
        num_inputs=width,
        codes=codes,
        scales=torch.ones(width, 1, device=device, dtype=dtype),
        zeros=None,
        bias=None,
        activations="token",
    )
