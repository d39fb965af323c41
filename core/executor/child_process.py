"""What the processes that Quire starts have in common: how they begin, hang and end."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

HANG_MARK = "Timeout ("
"""How faulthandler begins what it leaves after a step without an end."""
_CRASHED_THREAD = "Current thread "
HANG = "a step took longer than step_timeout_s: the device hangs, or the limit is too short for it"


def leave_signals_to_parent() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group; the front decides what follows.

    It finishes what runs, then ends its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class StepDeadline:
    """Ends this process when a step takes too long, with the traceback of all threads.

    The clock runs in a thread that needs no interpreter, so that it also sees a driver that hangs
    and holds it.
    """

    def __init__(self, limit_s: float | None, crash_file: TextIO | int) -> None:
        """`crash_file`: a file, or the number of one that is open, for the traceback."""
        self._limit_s = limit_s
        self._crash_file = crash_file

    @contextmanager
    def step(self) -> Iterator[None]:
        """Runs the clock inside; does nothing without a limit."""
        if self._limit_s is None:
            yield
            return
        faulthandler.dump_traceback_later(self._limit_s, exit=True, file=self._crash_file)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def shorten_crash(text: str, max_chars: int) -> str:
    """What faulthandler left, in at most `max_chars` characters.

    The stack of the thread that crashed comes right after the headline, so that no cut loses it:
    faulthandler writes the newest thread first, and the one that matters is most often the oldest.
    """
    parts = text.split("\n\n")
    parts[1:] = sorted(parts[1:], key=lambda part: not part.startswith(_CRASHED_THREAD))
    return "\n\n".join(parts)[:max_chars]


def describe_exit(what: str, exit_code: int) -> str:
    """How `the process of ...` ended, in words. Negative codes are signals."""
    if exit_code >= 0:
        hint = (
            "; a script that starts an engine process needs `if __name__ == '__main__':` "
            "around its start"
            if exit_code == 1
            else ""
        )
        return f"{what} exited with code {exit_code}{hint}"
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    hint = "; was the machine out of memory?" if name == "SIGKILL" else ""
    return f"{what} was killed by {name}{hint}"
