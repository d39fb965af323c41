"""What an accelerator's figures should be, and what they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from quire.benchmarks.recording import Record, make_console


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A bound on one kind of figure of Quire's."""

    work: str
    """What its `work` begins with."""
    bound: float
    is_least: bool
    """Whether figures must be at least the bound; else at most."""

    def is_met(self, value: float) -> bool:
        """Whether a figure keeps to it."""
        return value >= self.bound if self.is_least else value <= self.bound


TARGETS = (
    Target(work="decode attention", bound=0.8, is_least=True),
    Target(work="rms_norm", bound=0.8, is_least=True),
    Target(work="add_rms_norm", bound=0.8, is_least=True),
    Target(work="prefill attention", bound=0.6, is_least=True),
    Target(work="decode step, llama-8b", bound=1.25, is_least=False),
    Target(work="host's part of a decode step", bound=0.3, is_least=False),
)
"""Of measurements, in their own units."""
RATIOS = (Target(work="mixed load", bound=24.0, is_least=True),)
"""Of ratios to transformers' `generate`."""


def judge(record: Record) -> Iterator[tuple[str, float, Target]]:
    """Each figure for which there is a target, with it. Figures of peers have none."""
    for measurement in record.measurements:
        is_ours = measurement.subject == "quire" or measurement.subject.startswith("triton")
        for target in TARGETS:
            if is_ours and measurement.work.startswith(target.work):
                yield measurement.work, measurement.median, target
    for ratio in record.ratios:
        for target in RATIOS:
            if ratio.better == "quire" and ratio.work.startswith(target.work):
                yield f"{ratio.work}, over generate", ratio.median, target


def show_targets(record: Record) -> None:
    """Prints which are met."""
    table = Table("work", "median", "target", "", title="targets")
    for work, value, target in judge(record):
        bound = f"{'at least' if target.is_least else 'at most'} {target.bound:g}"
        table.add_row(work, f"{value:,.2f}", bound, "met" if target.is_met(value) else "missed")
    if table.row_count:
        make_console().print(table)
