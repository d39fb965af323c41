"""Everything that is to be known of an accelerator, in one command that ends within nine minutes.

    python -m quire.benchmarks.accelerator --backend cuda --out record.json

The ceilings of the device first, then each kernel as a fraction of them, then the whole engine
beside transformers' `generate` with the same random weights, then the conformance suite. What no
longer fits into the time is left out and named; what has been measured is written after each part.
`--dry-run` walks the same way on tiny shapes in Triton's interpreter (TRITON_INTERPRET=1): its
figures mean nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from quire.benchmarks.accelerator_attention import AttentionSubject, attention_subjects
from quire.benchmarks.accelerator_engine import EngineRun
from quire.benchmarks.accelerator_extensions import DRY_SHAPES, FULL_SHAPES, Extensions
from quire.benchmarks.accelerator_kernels import (
    DRY,
    FULL,
    Ceiling,
    measure_ceiling,
    measure_kernels,
)
from quire.benchmarks.accelerator_targets import show_targets
from quire.benchmarks.budget import Budget, Part
from quire.benchmarks.recording import Measurement, Record
from quire.core.discovery import load_backend
from quire.core.interface import Device, QuireError

_BUDGET_S = 9 * 60
_KERNELS_S = 30
_KERNEL_S = 15
"""Of each other kernel."""
_ATTENTION_S = {"quire": 30, "torch flex": 60}
"""Compilation included; of any other library `_LIBRARY_S`."""
_LIBRARY_S = 30
_ENGINE_S = {"llama-1b": (45, 25, 30), "llama-8b": (90, 45, 60)}
"""Of Quire, `generate` and continuous batching, starts included."""
_SUITE_S = {1: 120, 2: 240}
"""By level; the highest that fits is run."""


def main(
    backend: Annotated[str, typer.Option(help="as in `quire backends`")] = "cuda",
    dry_run: Annotated[bool, typer.Option(help="tiny shapes; figures mean nothing")] = False,
    budget_s: Annotated[int, typer.Option(help="seconds for everything")] = _BUDGET_S,
    folder: Annotated[Path | None, typer.Option(help="where models are kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Measures, prints a table and writes JSON. Ends with 1 if a part failed."""
    budget = Budget(seconds=budget_s)
    device = _open(backend)
    record = _make_record(backend, device, is_dry=dry_run)
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    sizes = DRY if dry_run else FULL
    ceiling, record.measurements = measure_ceiling(device, sizes)
    parts = [
        *_kernel_parts(backend, device, ceiling, record, is_dry=dry_run),
        Part(name="closing the device", needs_s=0, work=device.close),
        *_engine_parts(backend, home, ceiling, record, is_dry=dry_run),
    ]
    budget.run(parts, after_each=lambda: _write(record, budget, out))
    budget.run([_suite_part(backend, record, budget.left_s, is_dry=dry_run)])
    path = _write(record, budget, out)
    record.show()
    if not dry_run:
        show_targets(record)
    print(f"written to {path}")
    _end(budget)


def _open(backend: str) -> Device:
    """The first device; ends the program with what is so and what to do where there is none."""
    try:
        return load_backend(backend).open(0)
    except QuireError as error:
        print(f"{backend} cannot be measured: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


def _make_record(backend: str, device: Device, *, is_dry: bool) -> Record:
    info = device.info
    details = ", ".join(f"{name} {value}" for name, value in sorted(info.details.items()))
    return Record(
        name=f"accelerator_{backend}" + ("_dry" if is_dry else ""),
        settings={"device": info.name, "architecture": info.architecture},
        facts={"device": f"{info.name} ({info.architecture}); {details}"},
    )


def _write(record: Record, budget: Budget, out: Path | None) -> Path:
    record.facts["left_out"] = budget.left_out
    record.facts["not_measured"] = budget.failed
    return record.write(out)


def _end(budget: Budget) -> None:
    """Ends the process, at once where a thread of a part that was stopped may still run."""
    if budget.was_stopped:
        sys.stdout.flush()
        os._exit(1 if budget.failed else 0)
    raise typer.Exit(1 if budget.failed else 0)


def _kernel_parts(
    backend: str, device: Device, ceiling: Ceiling, record: Record, *, is_dry: bool
) -> Sequence[Part]:
    sizes = DRY if is_dry else FULL

    def layers() -> None:
        record.measurements += measure_kernels(device, sizes, ceiling)

    def attention(subject: AttentionSubject) -> None:
        record.measurements += subject.measure(device, sizes, ceiling)

    def extension(measure: Callable[[], list[Measurement]]) -> None:
        record.measurements += measure()

    shapes = DRY_SHAPES if is_dry else FULL_SHAPES
    others = Extensions(device=device, sizes=sizes, shapes=shapes, ceiling=ceiling)
    subjects = attention_subjects(backend, device, sizes, is_dry=is_dry)
    return [
        Part(name="layers and sampling", needs_s=0 if is_dry else _KERNELS_S, work=layers),
        *(
            Part(
                name=f"attention of {subject.name}",
                needs_s=0 if is_dry else _ATTENTION_S.get(subject.name, _LIBRARY_S),
                work=partial(attention, subject),
            )
            for subject in subjects
        ),
        *(
            Part(
                name=f"kernel {name}",
                needs_s=0 if is_dry else _KERNEL_S,
                work=partial(extension, measure),
            )
            for name, measure in others.kernels()
        ),
    ]


def _engine_parts(
    backend: str, home: Path, ceiling: Ceiling, record: Record, *, is_dry: bool
) -> Sequence[Part]:
    parts = []
    for shape, needs_s in {"llama-tiny": (0, 0, 0)}.items() if is_dry else _ENGINE_S.items():
        run = EngineRun(backend=backend, shape=shape, home=home, record=record, is_dry=is_dry)
        works = (
            ("quire", partial(run.quire, ceiling)),
            ("generate", run.generate),
            ("continuous batching of transformers", run.batched),
        )
        parts += [
            Part(name=f"{name}, {shape}", needs_s=seconds, work=work)
            for (name, work), seconds in zip(works, needs_s, strict=True)
        ]
    return parts


def _suite_part(backend: str, record: Record, left_s: float, *, is_dry: bool) -> Part:
    """The conformance suite as far as the time goes; booting alone in a dry run."""
    level = 0 if is_dry else max((n for n, s in _SUITE_S.items() if s <= left_s), default=1)
    return Part(
        name=f"conformance at level {level}",
        needs_s=_SUITE_S.get(level, 0),
        work=partial(_certify, backend, level, record, workers=1 if is_dry else 4),
    )


def _certify(backend: str, level: int, record: Record, *, workers: int) -> None:
    from quire.conformance.run import run_suite

    report = run_suite(backend, level=level, workers=workers, is_quiet=True)
    record.facts["conformance"] = {"level": report.level, **report.counts}


if __name__ == "__main__":
    typer.run(main)
