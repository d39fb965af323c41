"""A worker in a process of its own: the child's side."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeAlias

import msgspec

from quire.core.config import EngineConfig
from quire.core.errors import DeviceError
from quire.core.executor.child_process import StepDeadline, leave_signals_to_parent
from quire.core.executor.error_records import ErrorRecord, record_error
from quire.core.executor.executor import Executor
from quire.core.executor.worker_messages import (
    Call,
    Collect,
    Failed,
    FromWorker,
    Stepped,
    Submit,
    ToWorker,
    Value,
)
from quire.core.interface.worker import CachePlan, PendingStep, StepBatch

StartWorker: TypeAlias = Callable[[EngineConfig], tuple[msgspec.Struct, Executor]]
"""Plans, and makes the executor that the child calls; the record is for the parent.

Importable by name, since another process is to call it. Raises as `plan_engine` does.
"""

_STDERR = 2
_PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal that a process gets when the thread that started it is gone."""


def _register(executor: Executor, argument: bytes) -> None:
    name, pickled = msgspec.msgpack.decode(argument, type=tuple[str, bytes])
    # The parent made it: whoever could forge it runs this process already.
    executor.register_logits_processor(name, pickle.loads(pickled))  # noqa: S301


def _allocate(executor: Executor, argument: bytes) -> None:
    executor.allocate_cache(msgspec.msgpack.decode(argument, type=CachePlan))


def _warm_up(executor: Executor, _: bytes) -> None:
    executor.warm_up()
    gc.collect()
    gc.freeze()  # the collector need not look at modules and weights again and again


CALLS: dict[str, Callable[[Executor, bytes], Any]] = {
    "load_model": lambda executor, _: executor.load_model(),
    "cache_budget_bytes": lambda executor, _: executor.cache_budget_bytes(),
    "allocate_cache": _allocate,
    "warm_up": _warm_up,
    "warm_up_more": lambda executor, _: executor.warm_up_more(),
    "register_logits_processor": _register,
    "health": lambda executor, _: executor.health(),
    "memory_by_tag": lambda executor, _: executor.memory_by_tag(),
}
"""What a `Call` may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnds:
    """What the child is handed: its connection, and where its stderr goes."""

    connection: Connection[bytes, bytes]
    stderr: Connection[bytes, bytes]
    is_bound_to_thread: bool
    """Whether the thread that starts the child lives as long as its process."""


def run_worker_process(ends: ChildEnds, start: StartWorker, config: EngineConfig) -> None:
    """The child's main function: serves until the parent closes its end or is gone."""
    leave_signals_to_parent()
    os.dup2(ends.stderr.fileno(), _STDERR)
    ends.stderr.close()
    faulthandler.enable(_STDERR)
    _exit_with_parent(may_signal=ends.is_bound_to_thread)
    WorkerLoop(ends.connection, StepDeadline(config.step_timeout_s, _STDERR)).run(start, config)


class WorkerLoop:
    """Takes messages in their order, and answers."""

    def __init__(self, connection: Connection[bytes, bytes], deadline: StepDeadline) -> None:
        self._connection = connection
        self._deadline = deadline
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
        self._uncollected: deque[PendingStep | ErrorRecord] = deque()

    def run(self, start: StartWorker, config: EngineConfig) -> None:
        """Starts the worker, tells how that went, and serves until the connection ends."""
        try:
            record, executor = start(config)
        except Exception as error:  # the parent raises it
            self._send(Failed(record_error(error)))
            return
        try:
            self._send(Value(self._encoder.encode(record)))
            while (message := self._receive()) is not None:
                answer = self._take(executor, message)
                if answer is not None:
                    self._send(answer)
        finally:
            executor.close()
            gc.unfreeze()  # what has a finalizer may still have it run

    def _receive(self) -> ToWorker | None:
        """The next message; None when the parent has closed its end."""
        try:
            return self._decoder.decode(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            return None

    def _send(self, message: FromWorker) -> None:
        try:
            self._connection.send_bytes(self._encoder.encode(message))
        except ConnectionError:  # nobody listens any more: the next receive ends the loop
            return

    def _take(self, executor: Executor, message: ToWorker) -> FromWorker | None:
        match message:
            case Submit(batch):
                self._uncollected.append(self._submit(executor, batch))
                return None
            case Collect():
                return self._collect()
            case Call(name, argument):
                return self._call(executor, name, argument)

    def _submit(self, executor: Executor, batch: StepBatch) -> PendingStep | ErrorRecord:
        """The step, or why it could not begin: the parent hears of that when it collects."""
        if any(isinstance(one, ErrorRecord) for one in self._uncollected):
            lost = DeviceError(f"step {batch.step_id} was built on one that did not happen")
            return record_error(lost)
        try:
            with self._deadline.step():
                return executor.submit(batch)
        except Exception as error:
            return record_error(error)

    def _collect(self) -> FromWorker:
        step = self._uncollected.popleft()
        if isinstance(step, ErrorRecord):
            return Failed(step)
        try:
            with self._deadline.step():
                return Stepped(step.result())
        except Exception as error:
            return Failed(record_error(error))

    def _call(self, executor: Executor, name: str, argument: bytes) -> FromWorker:
        try:
            return Value(self._encoder.encode(CALLS[name](executor, argument)))
        except Exception as error:
            return Failed(record_error(error))


def _exit_with_parent(*, may_signal: bool) -> None:
    """Ends this process with its parent also while it computes, or hangs.

    Where there is prctl the kernel does it, which needs nobody's help; else a thread.
    """
    if may_signal and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="quire-parent-watch", daemon=True).start()
