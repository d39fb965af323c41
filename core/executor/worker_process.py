"""One worker in a process of its own: a driver that crashes there takes nobody along."""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import msgspec

from quire.core.config import EngineConfig
from quire.core.errors import DeviceLost, QuireError, RequestError
from quire.core.executor.child_process import HANG, HANG_MARK, describe_exit
from quire.core.executor.error_output import ErrorOutput
from quire.core.executor.error_records import WORKER, restore_error
from quire.core.executor.executor import Executor
from quire.core.executor.worker_child import ChildEnds, StartWorker, run_worker_process
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
from quire.core.interface.worker import (
    CachePlan,
    ModelInfo,
    PendingStep,
    StepBatch,
    StepResult,
)

_WHAT = "the process of the worker"
_CLOSED = "the worker was closed; start another engine"
_SHUTDOWN_GRACE_S = 10.0
_DEATH_GRACE_S = 5.0
"""How long a child that hung up may take to be gone."""
_DEADLINE_GRACE_S = 30.0
"""How much later than the child itself we notice that it hangs: it can tell where."""

T = TypeVar("T")


class WorkerProcess(Executor):
    """Starts a child that runs the worker, passes calls on, and tells how it ended.

    Whatever is asked of a child that is gone raises DeviceLost: how the process ended in the
    message, the last lines of its stderr in a note.
    """

    def __init__(self, start: StartWorker, config: EngineConfig) -> None:
        """Returns at once; the child begins with `start(config)`. Call `started` next."""
        self._connection, childs_end = multiprocessing.Pipe()
        self._stderr = ErrorOutput()
        ends = ChildEnds(
            connection=childs_end,
            stderr=self._stderr.writer,
            is_bound_to_thread=threading.current_thread() is threading.main_thread(),
        )
        self._process = multiprocessing.get_context("spawn").Process(
            target=run_worker_process, args=(ends, start, config), name="quire-worker"
        )
        try:
            self._process.start()
        except BaseException:
            self._connection.close()
            raise
        finally:
            # Ours must be closed: or we would never see that the child has closed its own.
            childs_end.close()
            self._stderr.writer.close()
        assert self._process.pid is not None, self._process
        self.pid = self._process.pid
        """The child's process id."""
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)
        self._uncollected: deque[_RemoteStep] = deque()
        self._loss: tuple[str, str] | None = None
        self._is_closed = False
        limit_s = config.step_timeout_s
        # Of one answer the child may compute two steps, each with the time that the user gave it.
        self._patience_s = None if limit_s is None else 2 * limit_s + _DEADLINE_GRACE_S
        self._watch = _Watch(self._process)
        self._closer = weakref.finalize(self, _end, self._process, self._watch, self._connection)
        # multiprocessing joins its children at exit: ours must have been told to stop before.
        atexit.register(self._closer)

    def started(self, kind: type[T]) -> T:
        """The record that the child's `start` made. To be asked once, first.

        Raises: what the child met; DeviceLost.
        """
        return self._value(self._receive(None), kind)

    def load_model(self) -> ModelInfo:
        """Loads the weights, in the child."""
        return self._call("load_model", ModelInfo)

    def cache_budget_bytes(self) -> int:
        """The worker's own answer."""
        return self._call("cache_budget_bytes", int)

    def allocate_cache(self, plan: CachePlan) -> None:
        """Allocates the blocks."""
        self._call("allocate_cache", type(None), self._encoder.encode(plan))

    def warm_up(self) -> None:
        """Warms the worker up."""
        self._call("warm_up", type(None))

    def warm_up_more(self) -> bool:
        """Lets the worker do one more piece."""
        return self._call("warm_up_more", bool)

    def submit(self, batch: StepBatch) -> PendingStep:
        """Hands a step to the child and returns; what befalls it there, its `result` raises.

        Raises: DeviceLost.
        """
        self._send(Submit(batch))
        step = _RemoteStep(self, batch.step_id)
        self._uncollected.append(step)
        return step

    def register_logits_processor(self, name: str, function: Any) -> None:
        """Sends a function by its name in its module.

        Raises: RequestError for one that has none, and as the worker does.
        """
        try:
            pickled = pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RequestError(
                f"the logits processor {name!r} cannot be sent to the process of the worker: "
                f"{error}; define it at the top of a module, or leave worker_process out",
                param="logits_processors",
            ) from error
        argument = self._encoder.encode((name, pickled))
        self._call("register_logits_processor", type(None), argument)

    def health(self) -> None:
        """Asks the worker."""
        self._call("health", type(None))

    def memory_by_tag(self) -> dict[str, int]:
        """The worker's own answer."""
        return self._call("memory_by_tag", dict[str, int])

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Calls back from another thread as soon as the child is gone, unless it was closed."""
        self._watch.tell(on_lost)

    def close(self) -> None:
        """Ends the child, by force if it does not listen. Calling twice is harmless."""
        self._is_closed = True
        atexit.unregister(self._closer)
        self._closer()

    def collect(self, wanted: _RemoteStep) -> None:
        """Waits for steps in their order, up to and with this one. Raises: DeviceLost."""
        while wanted.outcome is None:
            self._send(Collect())
            answer = self._receive(self._patience_s)
            step = self._uncollected.popleft()
            if isinstance(answer, Stepped):
                step.outcome = answer.result
            else:
                assert isinstance(answer, Failed), answer
                step.outcome = restore_error(answer.error, where=WORKER)

    def _call(self, name: str, kind: type[T], argument: bytes = b"") -> T:
        self._send(Call(name, argument))
        return self._value(self._receive(None), kind)

    def _value(self, answer: FromWorker, kind: type[T]) -> T:
        if isinstance(answer, Failed):
            raise restore_error(answer.error, where=WORKER)
        assert isinstance(answer, Value), answer
        return msgspec.msgpack.decode(answer.value, type=kind)

    def _send(self, message: ToWorker) -> None:
        if self._is_closed:
            raise DeviceLost(_CLOSED)
        try:
            self._connection.send_bytes(self._encoder.encode(message))
        except OSError:
            raise self._lost() from None
        except BaseException:  # half a message is worse than none: this ends the conversation
            self._process.kill()
            raise

    def _receive(self, patience_s: float | None) -> FromWorker:
        try:
            if patience_s is not None and not self._connection.poll(patience_s):
                self._process.kill()
                self._loss = (f"{_WHAT} did not answer within {patience_s:g} s and was killed", "")
                raise self._lost()
            return self._decoder.decode(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise self._lost() from None
        except BaseException:  # the answer would be taken for that of the next question
            self._process.kill()
            raise

    def _lost(self) -> DeviceLost:
        """The error of whoever asks a child that is gone."""
        if self._loss is None:
            self._loss = self._last_words()
        message, stderr = self._loss
        error = DeviceLost(message)
        if stderr:
            error.add_note(f"The last lines of {WORKER}'s stderr:\n{stderr}")
        return error

    def _last_words(self) -> tuple[str, str]:
        """How the child ended, and the end of its stderr."""
        exit_code = self._watch.exit_code(_DEATH_GRACE_S)
        if exit_code is None:
            self._process.kill()
            exit_code = self._watch.exit_code(None)
        stderr = self._stderr.tail()
        if exit_code == 1 and HANG_MARK in stderr:
            return HANG, stderr
        return describe_exit(_WHAT, exit_code or 0), stderr


class _RemoteStep(PendingStep):
    """A step in the child."""

    def __init__(self, owner: WorkerProcess, step_id: int) -> None:
        self._owner = owner
        self.step_id = step_id
        self.outcome: StepResult | QuireError | None = None

    def result(self) -> StepResult:
        """Waits for the step, and for those before it."""
        if self.outcome is None:
            self._owner.collect(self)
        if isinstance(self.outcome, QuireError):
            raise self.outcome
        assert self.outcome is not None, self.step_id
        return self.outcome


class _Watch:
    """A thread that reaps the child, and it alone, and says so when nobody expected that."""

    def __init__(self, process: SpawnProcess) -> None:
        self._on_lost: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._exit_code: int | None = None
        self._thread = threading.Thread(
            target=self._run, args=(process,), name="quire-worker-watch", daemon=True
        )
        self._thread.start()

    def tell(self, on_lost: Callable[[], None] | None) -> None:
        """Whom to tell; at once if the child is gone already. None: nobody."""
        with self._lock:
            self._on_lost = on_lost
            is_late = self._exit_code is not None
        if is_late and on_lost is not None:
            on_lost()

    def exit_code(self, limit_s: float | None) -> int | None:
        """How the child ended; None if it lives on after so long."""
        self._thread.join(limit_s)
        return self._exit_code

    def _run(self, process: SpawnProcess) -> None:
        wait([process.sentinel])
        process.join()
        with self._lock:
            self._exit_code = process.exitcode
            on_lost = self._on_lost
        if on_lost is not None:
            on_lost()


def _end(process: SpawnProcess, watch: _Watch, connection: Connection[bytes, bytes]) -> None:
    """Hangs up, which tells the child to end, waits for it, and kills it if need be."""
    watch.tell(None)
    connection.close()
    try:
        watch.exit_code(_SHUTDOWN_GRACE_S)
    finally:
        process.kill()
        watch.exit_code(None)
        process.close()
