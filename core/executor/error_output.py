"""What a child writes to its stderr: passed on as it comes, and its end kept for when it dies."""

from __future__ import annotations

import contextlib
import os
import threading
from multiprocessing.connection import Connection

_STDERR = 2
_KEPT_BYTES = 16_384
_DRAIN_S = 2.0


class ErrorOutput:
    """Passes a child's stderr on to ours; on a terminal the child sees one too.

    So it draws its bars of progress as if it wrote there itself.
    """

    def __init__(self) -> None:
        """Starts the thread that reads, until the child and all that it started are gone."""
        read_fd, write_fd = os.openpty() if os.isatty(_STDERR) else os.pipe()
        self.writer: Connection[bytes, bytes] = Connection(write_fd, readable=False)
        """The child's end. To be closed here once the child has it."""
        self._tail = bytearray()
        self._thread = threading.Thread(
            target=self._pass_on, args=(read_fd,), name="quire-worker-stderr", daemon=True
        )
        self._thread.start()

    def tail(self) -> str:
        """The last lines. Waits a moment for what is on its way; to be asked when it is gone."""
        self._thread.join(_DRAIN_S)
        return self._tail.decode("utf-8", errors="replace")

    def _pass_on(self, read_fd: int) -> None:
        try:
            while chunk := os.read(read_fd, 1 << 16):
                self._tail += chunk
                del self._tail[:-_KEPT_BYTES]
                with contextlib.suppress(OSError):  # ours may be closed
                    os.write(_STDERR, chunk)
        except OSError:  # how a terminal says that nobody writes any more
            return
        finally:
            os.close(read_fd)
