"""The engine core in its own process: the parent's side."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess

import msgspec
import zmq

from quire.core.config import EngineConfig
from quire.core.engine.core import BuildCore
from quire.core.engine.endpoints import BoundSockets, Endpoints, bind_sockets, make_closer
from quire.core.engine.messages import Exited, FromCore, Shutdown, ToCore
from quire.core.engine.process import run_core_process
from quire.core.errors import EngineDeadError
from quire.core.executor.child_process import HANG, HANG_MARK, describe_exit, shorten_crash
from quire.core.executor.error_records import ErrorRecord

_WATCH_ADDRESS = "inproc://exited"
_SHUTDOWN_GRACE_S = 10.0
_CONNECT_LIMIT_MS = 10_000
_WHAT = "the process of the engine core"
_MAX_CRASH_CHARS = 4000


class CoreProcess:
    """Starts the child, watches it and ends it. Its two sockets are used by one thread.

    When the child is gone, however that came about, an `Exited` message arrives in `from_core`.
    """

    def __init__(
        self, config: EngineConfig, build_core: BuildCore, *, transport: str | None = None
    ) -> None:
        """Returns at once.

        The child answers `Ready` or `Fatal`. `transport`: `ipc` or `tcp`; None: the best
        there is.
        """
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets = bind_sockets(self.context, transport=transport)
        self.from_core.bind(_WATCH_ADDRESS)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromCore] = msgspec.msgpack.Decoder(FromCore)
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_core_process,
            args=(config, self.endpoints, build_core),
            name="quire-engine-core",
        )
        try:
            self._process.start()
        except BaseException:
            make_closer(self.context, self._sockets)()
            raise
        assert self._process.pid is not None, self._process
        self.pid = self._process.pid
        """The child's process id."""
        watcher = _start_watcher(self._process, self.context)
        self._closer = weakref.finalize(
            self,
            _end,
            self._process,
            watcher,
            self._sockets,
            make_closer(self.context, self._sockets),
        )
        # multiprocessing joins its children at exit: ours must have been told to stop before.
        atexit.register(self._closer)

    @property
    def endpoints(self) -> Endpoints:
        """Where the child is met."""
        return self._sockets.endpoints

    @property
    def from_core(self) -> zmq.Socket[bytes]:
        """Messages of the child."""
        return self._sockets.from_core

    def wait_for_ears(self) -> None:
        """Returns when the child can hear: its second socket may connect a moment after its first.

        Raises: EngineDeadError if it does not.
        """
        if not self._sockets.to_core.poll(_CONNECT_LIMIT_MS, zmq.POLLOUT):
            raise EngineDeadError("the engine core started and does not listen; start another")

    def send(self, message: ToCore) -> None:
        """Hands a message to the child.

        Never waits. One that is gone hears nothing: `Exited` is on its way.
        """
        with contextlib.suppress(zmq.Again):
            self._sockets.to_core.send(self._encoder.encode(message), zmq.NOBLOCK)

    def decode(self, frame: bytes) -> FromCore:
        """A message of the child."""
        return self._decoder.decode(frame)

    def last_words(self, exit_code: int) -> ErrorRecord:
        """Why the child is gone: from what it left, else from how it ended."""
        try:
            return msgspec.msgpack.decode(self.endpoints.fatal_file.read_bytes(), type=ErrorRecord)
        except (OSError, msgspec.DecodeError):
            crash = self._crash_text()
            if crash.startswith(HANG_MARK):
                return ErrorRecord(kind="StepTimeout", message=HANG, traceback=crash)
            return ErrorRecord(
                kind="ProcessExited", message=describe_exit(_WHAT, exit_code), traceback=crash
            )

    def kill(self) -> None:
        """Ends the child now, as when its start is given up, and closes the sockets."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Ends the child, by force if it does not listen, and closes the sockets.

        Calling twice is harmless.
        """
        atexit.unregister(self._closer)
        self._closer()

    def _crash_text(self) -> str:
        try:
            text = self.endpoints.crash_file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return shorten_crash(text, _MAX_CRASH_CHARS)


def _start_watcher(
    process: SpawnProcess, context: zmq.Context[zmq.Socket[bytes]]
) -> threading.Thread:
    """A thread that says `Exited` when the child is gone. It alone reaps the child."""

    def watch() -> None:
        wait([process.sentinel])
        process.join()
        with context.socket(zmq.PUSH) as socket:
            socket.connect(_WATCH_ADDRESS)
            socket.send(msgspec.msgpack.encode(Exited(process.exitcode or 0)))

    thread = threading.Thread(target=watch, name="quire-core-watch", daemon=True)
    thread.start()
    return thread


def _end(
    process: SpawnProcess,
    watcher: threading.Thread,
    sockets: BoundSockets,
    close_sockets: Callable[[], None],
) -> None:
    """Asks the child to stop, waits, kills it if need be, and closes what is ours."""
    try:
        sockets.to_core.send(msgspec.msgpack.encode(Shutdown()), zmq.NOBLOCK)
        watcher.join(_SHUTDOWN_GRACE_S)
    except zmq.Again:  # it never came as far as its sockets, or is gone
        pass
    finally:
        process.kill()
        watcher.join()
        process.close()
        close_sockets()
