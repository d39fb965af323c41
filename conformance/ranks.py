"""Real processes, one a rank, each with its own opened device: what level 4 drives."""

from __future__ import annotations

import importlib
import multiprocessing
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from quire.core.discovery import load_backend
from quire.core.errors import DeviceError, QuireError
from quire.core.interface import Device

START_S = 240.0
"""A driver that needs longer to open has failed."""
CALL_S = 180.0
"""Collectives of some thousand numbers; a deadlock is told from a slow machine by this."""

RankFunction = Callable[..., object]
"""Called as function(device, rank, **arguments) in each process; importable by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opener:
    """How another process opens the device under test: `module:function(rank, *arguments)`."""

    target: str
    arguments: tuple[str, ...]

    def open(self, rank: int) -> Device:
        """The device of one rank."""
        module, _, name = self.target.partition(":")
        device = getattr(importlib.import_module(module), name)(rank, *self.arguments)
        assert isinstance(device, Device), device
        return device


def opener_of(backend: str) -> Opener:
    """The opener for an installed backend."""
    return Opener(target="quire.conformance.ranks:open_installed", arguments=(backend,))


def open_installed(rank: int, name: str) -> Device:
    """Device number rank of a backend, modulo how many it has."""
    backend = load_backend(name)
    devices = backend.probe().devices
    return backend.open(devices[rank % len(devices)].index)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAnswer:
    """What one rank answered."""

    value: Any = None
    error: str = ""
    """Type and message of what it raised; empty: it answered."""
    is_typed: bool = False
    """Whether that was a DeviceError, as the contract asks."""
    details: str = ""


class RankGroup:
    """`world` processes that wait for work. A group that failed is not used again."""

    def __init__(self, opener: Opener, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        self.is_broken = False
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, opener, rank), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        for answer in self._answers(START_S):
            if answer.error:
                self.close()
                raise DeviceError(f"a rank could not open its device: {answer.error}")

    def call(
        self, function: RankFunction, arguments: Sequence[Mapping[str, Any]]
    ) -> list[RankAnswer]:
        """Runs `function` on every rank at once, with one mapping of arguments each."""
        for connection, mapping in zip(self._connections, arguments, strict=True):
            connection.send((function, dict(mapping)))
        answers = self._answers(CALL_S)
        self.is_broken = self.is_broken or any(answer.error for answer in answers)
        return answers

    def close(self) -> None:
        """Ends the processes."""
        self.is_broken = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=0.1 if process.is_alive() else None)
            process.kill()
            process.join()

    def _answers(self, timeout_s: float) -> list[RankAnswer]:
        return [_receive(connection, timeout_s) for connection in self._connections]


class RankGroups:
    """The groups of one test process, by size: started when they are first needed."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._groups: dict[int, RankGroup] = {}

    def of_size(self, world: int) -> RankGroup:
        """A group that is fit for use."""
        group = self._groups.get(world)
        if group is None or group.is_broken:
            if group is not None:
                group.close()
            group = self._groups[world] = RankGroup(self._opener, world)
        return group

    def close(self) -> None:
        """Ends every group. Calling twice is harmless."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()


def free_address() -> str:
    """Where a group of this machine may meet: a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _receive(connection: Connection, timeout_s: float) -> RankAnswer:
    try:
        if not connection.poll(timeout_s):
            return RankAnswer(error=f"no answer within {timeout_s:.0f} s: it hangs")
        answer = connection.recv()
    except (EOFError, OSError):
        return RankAnswer(error="its process ended")
    assert isinstance(answer, RankAnswer), answer
    return answer


def _serve(connection: Connection, opener: Opener, rank: int) -> None:
    """The life of one rank."""
    try:
        device = opener.open(rank)
    except BaseException as error:  # whatever a driver raises is the answer
        connection.send(_failed(error))
        return
    connection.send(RankAnswer())
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        try:
            answer = RankAnswer(value=function(device, rank, **arguments))
        except BaseException as error:  # an exit or a skip is an answer too
            answer = _failed(error)
        connection.send(answer)
    device.close()


def _failed(error: BaseException) -> RankAnswer:
    return RankAnswer(
        error=f"{type(error).__name__}: {error}",
        is_typed=isinstance(error, DeviceError) and isinstance(error, QuireError),
        details=traceback.format_exc(),
    )
