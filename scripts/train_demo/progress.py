"""What a run shows while it works: a bar on a terminal, lines in a log."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from train_demo.training import StepReport

LINE_INTERVAL_STEPS = 25
SMOOTHING = 0.95


class ProgressDisplay:
    """Follows the reports of a run and passes them on unchanged."""

    def __init__(self, console: Console) -> None:
        """Show on `console`, as a bar if it is a terminal."""
        self._console = console
        self._bar = _make_bar(console) if console.is_terminal else None
        self._loss: float | None = None
        self._clock = time.monotonic()
        self._clock_tokens: int | None = None

    def follow(self, reports: Iterable[StepReport]) -> Iterator[StepReport]:
        """Yield each report after showing it."""
        with self._bar or nullcontext():
            task = self._bar.add_task("training", total=1.0) if self._bar else None
            for report in reports:
                self._smooth(report.loss)
                if self._bar is not None and task is not None:
                    self._bar.update(
                        task, completed=report.progress, description=self._describe(report)
                    )
                elif report.step % LINE_INTERVAL_STEPS == 0:
                    self._print_line(report)
                yield report

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _smooth(self, loss: float) -> None:
        previous = loss if self._loss is None else self._loss
        self._loss = SMOOTHING * previous + (1.0 - SMOOTHING) * loss

    def _describe(self, report: StepReport) -> str:
        return f"step {report.step}  {report.num_tokens / 1e6:.2f}M tokens  loss {self._loss:.3f}"

    def _print_line(self, report: StepReport) -> None:
        now = time.monotonic()
        speed = ""
        if self._clock_tokens is not None:
            rate = (report.num_tokens - self._clock_tokens) / (now - self._clock)
            speed = f"  {rate:.0f} tokens/s"
        self._clock, self._clock_tokens = now, report.num_tokens
        self.note(
            f"{time.strftime('%H:%M:%S')}  {self._describe(report)}"
            f"  lr x{report.learning_rate_factor:.3f}  {100 * report.progress:.1f} %{speed}"
        )


def _make_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
