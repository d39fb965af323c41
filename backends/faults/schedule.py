"""Which fault happens when: the options as a record, and the counter of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from quire.core.interface import DeviceLost, Reason

PREFIX = "faults."


@dataclass(frozen=True, slots=True)
class Steps:
    """A set of steps: some by number, and all from one on."""

    numbers: frozenset[int] = frozenset()
    first_of_all: int | None = None

    def __contains__(self, step: int) -> bool:
        return step in self.numbers or (self.first_of_all is not None and step >= self.first_of_all)


NEVER = Steps()


def parse_steps(text: str) -> Steps:
    """`3`, `3,5` or `3+`. Raises: ValueError for anything else."""
    if text.endswith("+"):
        return Steps(first_of_all=int(text[:-1]))
    return Steps(numbers=frozenset(int(part) for part in text.split(",")))


def _parse_kind(text: str) -> str:
    if text not in {"nan", "noise"}:
        raise ValueError(text)
    return text


def _parse_flag(text: str) -> bool:
    return {"1": True, "true": True, "0": False, "false": False}[text.lower()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What goes wrong, as configured."""

    oom_at_step: Steps = NEVER
    lost_at_step: Steps = NEVER
    nan_logits_at_step: Steps = NEVER
    corrupt_block_at_step: Steps = NEVER
    corrupt_with: str = "nan"
    slow_copies_ms: float = 0.0
    hang_at_step: Steps = NEVER
    hang_s: float = 60.0
    oom_at_load: bool = False
    oom_at_allocate: bool = False

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> Faults:
        """The faults that `options` name; options of others are left to them.

        Raises: ValueError for an option that is none or says nothing.
        """
        given = {
            name.removeprefix(PREFIX): text
            for name, text in options.items()
            if name.startswith(PREFIX)
        }
        values: dict[str, Any] = {}
        for name, text in given.items():
            try:
                values[name] = _PARSERS[name](text)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{PREFIX}{name}={text}") from error
        return cls(**values)


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "oom_at_step": parse_steps,
    "lost_at_step": parse_steps,
    "nan_logits_at_step": parse_steps,
    "corrupt_block_at_step": parse_steps,
    "corrupt_with": _parse_kind,
    "slow_copies_ms": float,
    "hang_at_step": parse_steps,
    "hang_s": float,
    "oom_at_load": _parse_flag,
    "oom_at_allocate": _parse_flag,
}


def reason_against(options: Mapping[str, str]) -> Reason | None:
    """Why these options cannot be followed; None: they can."""
    try:
        Faults.from_options(options)
    except ValueError as error:
        known = ", ".join(f"{PREFIX}{field.name}" for field in fields(Faults))
        return Reason(
            code="faults.option",
            need=str(error),
            have=known,
            remedy="steps are 3, 3,5 or 3+; flags 0 or 1",
        )
    return None


class FaultSchedule:
    """The faults of one device and the step that it is in. Its parts share one of these."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.step = -1
        """The step that runs, or ran last; -1: none since the cache was allocated."""
        self.is_lost = False

    def begin_step(self) -> None:
        """Counts one more step."""
        self.step += 1

    def restart_count(self) -> None:
        """The next step is number 0."""
        self.step = -1

    def is_due(self, steps: Steps) -> bool:
        """Whether the step that runs is among `steps`."""
        return self.step in steps

    def check_alive(self) -> None:
        """Raises: DeviceLost, from the step at which the device was lost."""
        if self.is_lost:
            raise DeviceLost(f"the device was lost on purpose in step {self.step}; restart it")
