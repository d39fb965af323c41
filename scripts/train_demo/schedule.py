"""How far a run is, and what learning rate that gives."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What ends a run: tokens, a wall-clock deadline, or whichever of them comes first.

    With tokens alone the run is a pure function of its seed. A deadline makes the schedule follow
    the machine's speed: progress is the larger of both fractions, so the learning rate always
    reaches zero, however often the process was stopped on the way.
    """

    num_tokens: int | None = None
    start_s: float = 0.0
    """Wall-clock time at which this process took over."""
    deadline_s: float | None = None
    start_progress: float = 0.0
    """What an earlier process had reached, so that resuming continues the same line."""

    def progress(self, num_tokens_seen: int, now_s: float) -> float:
        """Between 0 and 1, and never falling as tokens and time grow."""
        by_tokens = num_tokens_seen / self.num_tokens if self.num_tokens else 0.0
        return min(1.0, max(by_tokens, self._progress_by_time(now_s), self.start_progress))

    def _progress_by_time(self, now_s: float) -> float:
        if self.deadline_s is None:
            return 0.0
        fraction = (now_s - self.start_s) / max(self.deadline_s - self.start_s, 1e-9)
        return self.start_progress + (1.0 - self.start_progress) * fraction


def learning_rate_factor(
    *, step: int, progress: float, num_warmup_steps: int, decay_fraction: float
) -> float:
    """Linear warm-up by steps, a plateau, and a linear decay to zero over the last fraction.

    Source: Hu et al. 2024, MiniCPM (warmup-stable-decay), section 4.
    """
    warmup = min(1.0, (step + 1) / num_warmup_steps)
    decay = min(1.0, (1.0 - progress) / decay_fraction)
    return max(0.0, min(warmup, decay))


def next_time_of_day(text: str, now: dt.datetime) -> dt.datetime:
    """The next moment the local clock shows `HH:MM`.

    Raises: ValueError if `text` is not a time of day.
    """
    time = dt.time.fromisoformat(text)
    moment = now.replace(hour=time.hour, minute=time.minute, second=0, microsecond=0)
    return moment if moment > now else moment + dt.timedelta(days=1)
