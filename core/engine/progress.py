"""A bar for batches that take a while, on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

_LONG_BATCH = 4


class ProgressBar:
    """Shows requests done and tokens a second on stderr.

    Silent for short batches and off a terminal.
    """

    def __init__(self, num_requests: int, *, is_wanted: bool) -> None:
        self._num_tokens = 0
        is_shown = is_wanted and num_requests >= _LONG_BATCH and sys.stderr.isatty()
        self._bar = _make_bar() if is_shown else None
        if self._bar is not None:
            self._task = self._bar.add_task("", total=num_requests, speed="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_tokens: int) -> None:
        """One request is done, with so many tokens."""
        self._num_tokens += num_tokens
        if self._bar is None:
            return
        elapsed = self._bar.tasks[self._task].elapsed or 0.0
        speed = f"{self._num_tokens / elapsed:,.0f} tokens/s" if elapsed else ""
        self._bar.update(self._task, advance=1, speed=speed)


def _make_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("requests"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
        console=Console(stderr=True),
    )
