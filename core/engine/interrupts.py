"""Ctrl-C at a place where nothing is half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class DeferredInterrupts:
    """While it is entered, Ctrl-C waits for the next `check`; a second Ctrl-C does not wait.

    Does nothing outside the main thread, or where the program has a handler of its own.
    """

    def __init__(self) -> None:
        self._num_pending = 0
        self._is_ours = False

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._is_ours = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._num_pending and kind is None:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raises: KeyboardInterrupt, if it was asked for meanwhile."""
        if self._num_pending:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._num_pending += 1
        if self._num_pending > 1:
            raise KeyboardInterrupt
