"""The engine core in its own process: the child's side."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

import msgspec
import zmq

from quire.core.config import EngineConfig
from quire.core.engine.core import BuildCore, EngineCore
from quire.core.engine.endpoints import Endpoints, connect_socket
from quire.core.engine.messages import (
    AbortRequests,
    AddRequests,
    Answer,
    Call,
    CheckHealth,
    Fatal,
    FromCore,
    Ready,
    Shutdown,
    ToCore,
    Updates,
)
from quire.core.executor.child_process import StepDeadline, leave_signals_to_parent
from quire.core.executor.error_records import record_error

CALLS: dict[str, Callable[[EngineCore], Any]] = {
    "statistics": EngineCore.statistics,
    "reset_prefix_cache": EngineCore.reset_prefix_cache,
    "health": EngineCore.health,
}
"""What a `Call` may name."""

_LINGER_MS = 2000
_ORPHAN_GRACE_S = 5.0
_INSIDE_ADDRESS = "inproc://inside"
"""Where threads of this process say something to its loop."""


def run_core_process(config: EngineConfig, endpoints: Endpoints, build_core: BuildCore) -> None:
    """The child's main function. Serves until it is told to stop, fails, or its parent is gone."""
    leave_signals_to_parent()
    with endpoints.crash_file.open("w", encoding="utf-8") as crash_file:
        faulthandler.enable(crash_file)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        mailbox = Mailbox(context, endpoints)
        _exit_with_parent(mailbox, endpoints.directory)
        # A worker that has a process of its own minds the time there, and alone ends with it.
        limit_s = None if config.worker_process else config.step_timeout_s
        deadline = StepDeadline(limit_s, crash_file)
        is_clean = _serve(config, build_core, mailbox, endpoints, deadline)
        mailbox.close(linger_ms=0 if is_clean else _LINGER_MS)
        context.term()
        faulthandler.disable()
    if not is_clean:
        raise SystemExit(1)


def _serve(
    config: EngineConfig,
    build_core: BuildCore,
    mailbox: Mailbox,
    endpoints: Endpoints,
    deadline: StepDeadline,
) -> bool:
    """Builds a core and runs it. Returns whether it ended because it was told to."""
    core: EngineCore | None = None
    try:
        core = build_core(config)
        gc.collect()
        gc.freeze()  # the collector need not look at modules and weights again and again
        core.watch(lambda: mailbox.say_inside(CheckHealth()))
        mailbox.send(Ready(core.config, core.facts))
        core.prepare_grammars()  # nobody's start waits for what perhaps nobody asks for
        CoreLoop(core, mailbox, deadline).run()
        return True
    except BaseException as error:  # whatever it is, the front must hear of it
        record = record_error(error)
        endpoints.fatal_file.write_bytes(msgspec.msgpack.encode(record))
        mailbox.send(Fatal(record))
        return False
    finally:
        if core is not None:
            core.close()
        gc.unfreeze()  # what has a finalizer may still have it run


class Mailbox:
    """The child's two sockets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Endpoints) -> None:
        key = endpoints.server_key
        self._context = context
        self._inbox = connect_socket(context, zmq.PULL, endpoints.to_core, key)
        self._inbox.bind(_INSIDE_ADDRESS)
        self._outbox = connect_socket(context, zmq.PUSH, endpoints.from_core, key)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore)

    def receive(self, *, may_wait: bool) -> ToCore | None:
        """The next message; None if there is none and it may not wait. Waiting uses no CPU."""
        try:
            return self._decoder.decode(self._inbox.recv(0 if may_wait else zmq.NOBLOCK))
        except zmq.Again:
            return None

    def send(self, message: FromCore) -> None:
        """Hands a message to the front; never waits."""
        self._outbox.send(self._encoder.encode(message))

    def say_inside(self, message: ToCore) -> None:
        """Puts a message into the inbox, from any thread; does nothing once it is closed."""
        with contextlib.suppress(zmq.ZMQError), self._context.socket(zmq.PUSH) as socket:
            socket.linger = 0
            socket.connect(_INSIDE_ADDRESS)
            socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)

    def close(self, *, linger_ms: int) -> None:
        """Closes both; what was sent has so long to arrive."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=linger_ms)


class CoreLoop:
    """Takes messages, runs steps, sends what they bring."""

    def __init__(self, core: EngineCore, mailbox: Mailbox, deadline: StepDeadline) -> None:
        self._core = core
        self._mailbox = mailbox
        self._deadline = deadline
        self._is_open = True

    def run(self) -> None:
        """Serves until Shutdown. Sleeps in the socket while there is nothing to do."""
        core = self._core
        while self._is_open:
            self._take_messages()
            if self._is_open and core.has_work():
                with self._deadline.step():
                    updates = core.step()
                if updates:
                    self._mailbox.send(Updates(updates))

    def _take_messages(self) -> None:
        core = self._core
        message = self._mailbox.receive(may_wait=False)
        # Whoever comes in an idle moment waits for one piece of it at most.
        if message is None and not core.has_work() and not core.warm_up_more():
            message = self._mailbox.receive(may_wait=True)
        while message is not None:
            self._take(message)
            if not self._is_open:
                return
            message = self._mailbox.receive(may_wait=False)

    def _take(self, message: ToCore) -> None:
        match message:
            case AddRequests(specs):
                for spec in specs:
                    self._core.add(spec)
            case AbortRequests(request_ids):
                self._core.abort(request_ids)
            case Call():
                self._mailbox.send(self._answer(message))
            case CheckHealth():
                self._core.health()
            case Shutdown():
                self._is_open = False

    def _answer(self, call: Call) -> Answer:
        try:
            return Answer(call.call_id, CALLS[call.name](self._core))
        except Exception as error:  # the caller gets it; the loop goes on
            return Answer(call.call_id, error=record_error(error))


def _exit_with_parent(mailbox: Mailbox, directory: str) -> None:
    """Starts the thread that ends this process with its parent, and removes what that left."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        shutil.rmtree(directory, ignore_errors=True)
        try:
            mailbox.say_inside(Shutdown())
            threading.Event().wait(_ORPHAN_GRACE_S)
        finally:
            os._exit(1)

    threading.Thread(target=watch, name="quire-parent-watch", daemon=True).start()
