"""How a front reaches an engine core: in its own process, or in another one."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from quire.core.config import EngineConfig
from quire.core.engine.core import BuildCore, EngineCore
from quire.core.engine.core_process import CoreProcess
from quire.core.engine.facts import EngineFacts, EngineStatistics
from quire.core.engine.messages import (
    AbortRequests,
    AddRequests,
    Answer,
    Call,
    Exited,
    Fatal,
    FromCore,
    Ready,
    Updates,
    same_death,
)
from quire.core.errors import ConfigError, EngineDeadError, RequestError
from quire.core.executor.error_records import dead_by, restore_error
from quire.core.scheduler.request import RequestSpec, RequestUpdate

_CLOSED = "the engine was closed; start another"


class CoreClient(ABC):
    """An engine core for a front that may wait. Used by one thread."""

    config: EngineConfig
    """Resolved."""
    facts: EngineFacts

    @abstractmethod
    def add(self, specs: Sequence[RequestSpec]) -> None:
        """Hands requests over. Raises: EngineDeadError."""

    @abstractmethod
    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends requests in the core; updates of theirs may still come. Raises: EngineDeadError."""

    @abstractmethod
    def receive(self) -> list[RequestUpdate]:
        """Waits for the next updates.

        To be called only with requests in flight.
        Raises: EngineDeadError.
        """

    @abstractmethod
    def statistics(self) -> EngineStatistics:
        """Numbers of this moment. Raises: EngineDeadError."""

    @abstractmethod
    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes. Raises: EngineDeadError."""

    def finish_warm_up(self) -> None:  # noqa: B027 - nothing is the right default
        """Does now what the start left for moments without work.

        A core in a process of its own has such moments, and nothing is done here. Raises:
        EngineDeadError, DeviceLost.
        """

    def register_logits_processor(self, name: str, function: Any) -> None:
        """Makes a function known to the worker.

        Raises: RequestError where the worker is out of reach.
        """
        raise RequestError(
            "functions as logits processors need the engine in this process; register "
            "module:function under a name with the setting logits_processors",
            param="logits_processors",
        )

    @abstractmethod
    def close(self) -> None:
        """Ends the core. Calling twice is harmless."""


class InProcessClient(CoreClient):
    """The core in this process and thread: a call of `receive` runs a step."""

    def __init__(self, config: EngineConfig, *, build_core: BuildCore = EngineCore.build) -> None:
        """Raises: ConfigError, UnsupportedError, PluginError, CheckpointError, DeviceError."""
        if config.step_timeout_s is not None and not config.worker_process:
            raise ConfigError(
                f"step_timeout_s {config.step_timeout_s:g} was asked for; a step that hangs here "
                "hangs this process: use has_own_process=True or worker_process=True, or leave it "
                "out"
            )
        self._core = build_core(config)
        self.config = self._core.config
        self.facts = self._core.facts

    def add(self, specs: Sequence[RequestSpec]) -> None:
        """Adds them to the scheduler."""
        for spec in specs:
            self._core.add(spec)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Ends them in the scheduler."""
        self._core.abort(request_ids)

    def receive(self) -> list[RequestUpdate]:
        """Runs one step."""
        return self._core.step()

    def statistics(self) -> EngineStatistics:
        """Asks the core."""
        return self._core.statistics()

    def reset_prefix_cache(self) -> bool:
        """Tells the core."""
        return self._core.reset_prefix_cache()

    def finish_warm_up(self) -> None:
        """Asks the core until nothing is left."""
        while self._core.warm_up_more():
            pass

    def register_logits_processor(self, name: str, function: Any) -> None:
        """Hands the function to the worker."""
        self._core.register_logits_processor(name, function)

    def close(self) -> None:
        """Closes the core."""
        self._core.close()


class ProcessClient(CoreClient):
    """The core in a process of its own, for a front without an event loop."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        build_core: BuildCore = EngineCore.build,
        transport: str | None = None,
    ) -> None:
        """Returns when the core can serve.

        Raises: what the core met at its start; EngineDeadError.
        """
        self._process = CoreProcess(config, build_core, transport=transport)
        self._updates: list[list[RequestUpdate]] = []
        self._num_calls = 0
        self._dead: EngineDeadError | None = None
        try:
            ready = read_start(self._process, self._next())
        except BaseException:
            self._process.kill()
            raise
        self.config, self.facts = ready.config, ready.facts

    @property
    def pid(self) -> int:
        """The core's process id."""
        return self._process.pid

    def add(self, specs: Sequence[RequestSpec]) -> None:
        """Sends them."""
        self._raise_if_dead()
        self._process.send(AddRequests(list(specs)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Sends their ids."""
        self._raise_if_dead()
        self._process.send(AbortRequests(list(request_ids)))

    def receive(self) -> list[RequestUpdate]:
        """Waits for the next message with updates."""
        while not self._updates:
            self._receive_one()
        return self._updates.pop(0)

    def statistics(self) -> EngineStatistics:
        """Asks the core between two steps."""
        return msgspec.convert(self._call("statistics"), EngineStatistics)

    def reset_prefix_cache(self) -> bool:
        """Tells the core between two steps."""
        return bool(self._call("reset_prefix_cache"))

    def close(self) -> None:
        """Ends the process."""
        if self._dead is None:
            self._dead = EngineDeadError(_CLOSED)
        self._process.close()

    def _call(self, name: str) -> Any:
        self._raise_if_dead()
        self._num_calls += 1
        self._process.send(Call(self._num_calls, name))
        while True:
            answer = self._receive_one()
            if answer is not None and answer.call_id == self._num_calls:
                return value_of(answer)

    def _receive_one(self) -> Answer | None:
        self._raise_if_dead()
        message = self._next()
        match message:
            case Updates(updates):
                self._updates.append(updates)
            case Answer():
                return message
            case _:
                self._dead = death(self._process, message)
                self._raise_if_dead()
        return None

    def _next(self) -> FromCore:
        return self._process.decode(self._process.from_core.recv())

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise same_death(self._dead)


class AsyncProcessClient:
    """The core in a process of its own, for a front on an event loop.

    `receive` is awaited by one task.
    """

    def __init__(self, process: CoreProcess, ready: Ready, socket: zmq.asyncio.Socket) -> None:
        self._process = process
        self._socket = socket
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._num_calls = 0
        self._dead: EngineDeadError | None = None
        self._is_closed = False
        self.config, self.facts = ready.config, ready.facts

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        build_core: BuildCore = EngineCore.build,
        transport: str | None = None,
    ) -> AsyncProcessClient:
        """Starts the process and returns when the core can serve.

        Raises: what the core met at its start; EngineDeadError.
        """
        process = CoreProcess(config, build_core, transport=transport)
        try:
            socket = zmq.asyncio.Socket(shadow=process.from_core)
            ready = read_start(process, process.decode(await socket.recv()))
        except BaseException:
            await asyncio.to_thread(process.kill)
            raise
        return cls(process, ready, socket)

    @property
    def pid(self) -> int:
        """The core's process id."""
        return self._process.pid

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the core is dead; None also after an orderly end."""
        return self._dead

    def add(self, specs: Sequence[RequestSpec]) -> None:
        """Sends them. Raises: EngineDeadError."""
        self._raise_if_dead()
        self._process.send(AddRequests(list(specs)))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Sends their ids. Raises: EngineDeadError."""
        self._raise_if_dead()
        self._process.send(AbortRequests(list(request_ids)))

    async def receive(self) -> list[RequestUpdate]:
        """The next updates.

        Answers to calls are delivered meanwhile.
        Raises: EngineDeadError, once and for all.
        """
        while True:
            self._raise_if_dead()
            message = self._process.decode(await self._socket.recv())
            match message:
                case Updates(updates):
                    return updates
                case Answer():
                    self._deliver(message)
                case _:
                    self._die(death(self._process, message))

    async def statistics(self) -> EngineStatistics:
        """Asks the core between two steps. Raises: EngineDeadError."""
        return msgspec.convert(await self._call("statistics"), EngineStatistics)

    async def reset_prefix_cache(self) -> bool:
        """Tells the core between two steps. Raises: EngineDeadError."""
        return bool(await self._call("reset_prefix_cache"))

    async def close(self) -> None:
        """Ends the process and waits for it. Nobody may be in `receive` any more."""
        self._is_closed = True
        self._fail_calls(EngineDeadError(_CLOSED))
        self._socket.close(linger=0)
        await asyncio.to_thread(self._process.close)

    async def _call(self, name: str) -> Any:
        self._raise_if_dead()
        self._num_calls += 1
        call_id = self._num_calls
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        try:
            self._process.send(Call(call_id, name))
            return await future
        finally:
            self._calls.pop(call_id, None)

    def _deliver(self, answer: Answer) -> None:
        future = self._calls.get(answer.call_id)
        if future is None or future.done():
            return
        try:
            future.set_result(value_of(answer))
        except Exception as error:  # the core's own, for whoever asked
            future.set_exception(error)

    def _die(self, error: EngineDeadError) -> None:
        self._dead = error
        self._fail_calls(error)

    def _fail_calls(self, error: EngineDeadError) -> None:
        for future in self._calls.values():
            if not future.done():
                future.set_exception(same_death(error))

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise same_death(self._dead)
        if self._is_closed:
            raise EngineDeadError(_CLOSED)


def read_start(process: CoreProcess, message: FromCore) -> Ready:
    """The first message of a core. Raises: what the core met at its start; EngineDeadError."""
    match message:
        case Ready():
            process.wait_for_ears()
            return message
        case Fatal(error):
            raise restore_error(error)
        case Exited(exit_code):
            raise restore_error(process.last_words(exit_code))
        case _:
            raise EngineDeadError(f"the engine core began with {type(message).__name__}")


def death(process: CoreProcess, message: FromCore) -> EngineDeadError:
    """What everybody who waits is told after the core's last message."""
    match message:
        case Fatal(error):
            return dead_by(error)
        case Exited(exit_code):
            return dead_by(process.last_words(exit_code))
        case _:
            return EngineDeadError(f"the engine core sent {type(message).__name__} out of turn")


def value_of(answer: Answer) -> Any:
    """The result of a call. Raises: what the core met."""
    if answer.error is not None:
        raise restore_error(answer.error)
    return answer.value
