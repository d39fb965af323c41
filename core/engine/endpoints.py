"""Where the front and the core meet: two sockets that nobody else can use."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import zmq

_MAX_IPC_PATH_BYTES = 100
"""The address of a Unix socket has room for 107 and a terminating zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """What the child must know. Pickled to it, never shown."""

    to_core: str
    from_core: str
    directory: str
    """Private to this user; holds the sockets and what a dying core leaves."""
    server_key: bytes | None
    """Proves to the front who knocks, where the address is open to others."""

    @property
    def crash_file(self) -> Path:
        """The tracebacks of all threads at a fatal signal."""
        return Path(self.directory) / "crash.txt"

    @property
    def fatal_file(self) -> Path:
        """The ErrorRecord of what the core died of."""
        return Path(self.directory) / "fatal.msgpack"


@dataclass(frozen=True, slots=True)
class BoundSockets:
    """The front's ends."""

    endpoints: Endpoints
    to_core: zmq.Socket[bytes]
    from_core: zmq.Socket[bytes]


def bind_sockets(
    context: zmq.Context[zmq.Socket[bytes]], *, transport: str | None = None
) -> BoundSockets:
    """Creates a private directory and binds the front's two sockets.

    `transport`: `ipc` or `tcp` on loopback; None: `ipc` where it exists.
    """
    directory = tempfile.mkdtemp(prefix="quire-")
    if transport is None:
        fits = len(directory.encode()) + len("/from_core") <= _MAX_IPC_PATH_BYTES
        transport = "ipc" if zmq.has("ipc") and fits else "tcp"
    to_core, from_core = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    server_key = None if transport == "ipc" else _ask_for_key(to_core, from_core)
    for socket in (to_core, from_core):
        socket.set_hwm(0)  # what is in flight is bounded by the requests, not here
        socket.linger = 0
    names = []
    for socket, name in ((to_core, "to_core"), (from_core, "from_core")):
        socket.bind(f"ipc://{directory}/{name}" if transport == "ipc" else "tcp://127.0.0.1:*")
        names.append(socket.get_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    endpoints = Endpoints(
        to_core=names[0], from_core=names[1], directory=directory, server_key=server_key
    )
    return BoundSockets(endpoints, to_core, from_core)


def connect_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, address: str, server_key: bytes | None
) -> zmq.Socket[bytes]:
    """The core's end of one socket."""
    socket = context.socket(kind)
    socket.set_hwm(0)
    if server_key is not None:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = server_key
    socket.connect(address)
    return socket


def make_closer(
    context: zmq.Context[zmq.Socket[bytes]], sockets: BoundSockets
) -> Callable[[], None]:
    """A function that closes the front's ends and removes the directory."""

    def close() -> None:
        sockets.to_core.close(linger=0)
        sockets.from_core.close(linger=0)
        context.term()
        shutil.rmtree(sockets.endpoints.directory, ignore_errors=True)

    return close


def _ask_for_key(*sockets: zmq.Socket[bytes]) -> bytes:
    """Any user of the machine can reach a loopback port: only who was handed this key is let in."""
    public, secret = zmq.curve_keypair()
    for socket in sockets:
        socket.curve_server = True
        socket.curve_secretkey = secret
        socket.curve_publickey = public
    return bytes(public)
