"""The life of the server's process: bind, load, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine
from quire.core.errors import ConfigError
from quire.core.serving.http.app import make_app
from quire.core.serving.operations.supervisor import Supervisor
from quire.core.serving.server_state import ServerState
from quire.core.serving.settings import ServerSettings

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LAST_BYTES_S = 5.0
"""How long connections may take to send what is written already, once no request is left."""

StartEngine = Callable[[EngineConfig], Awaitable[AsyncEngine]]


@dataclass(frozen=True, slots=True)
class Announcement:
    """Told when the server takes requests."""

    url: str
    engine: AsyncEngine
    said: tuple[str, ...] = ()
    """What the server chose by itself, one sentence each."""


def run_server(
    config: EngineConfig,
    settings: ServerSettings,
    *,
    announce: Callable[[Announcement], None] = lambda _: None,
    start_engine: StartEngine = AsyncEngine.start,
) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit status: 0, or 1 if the engine died.

    The port is taken before the model is loaded, so that a taken one costs no minutes.
    A second signal ends without waiting for requests.
    Raises: ConfigError if the address cannot be had; what `start_engine` raises.
    """
    with contextlib.closing(bind(settings.host, settings.port)) as listener:
        factory = uvicorn.Config("unused", log_config=None).get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(_live(config, settings, listener, announce, start_engine))


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address and does not listen yet.

    Raises: ConfigError if the address is taken, forbidden or unknown.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_bind(host, port, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_bind(host, port, error) from error
    return listener


def url_of(settings: ServerSettings, listener: socket.socket) -> str:
    """Where clients find the server."""
    scheme = "https" if settings.ssl_certfile else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


async def _live(
    config: EngineConfig,
    settings: ServerSettings,
    listener: socket.socket,
    announce: Callable[[Announcement], None],
    start_engine: StartEngine,
) -> int:
    stop = asyncio.Event()
    with _on_signals(stop.set):
        engine = await _unless_stopped(start_engine(config), stop)
        if engine is None:
            return 0
        try:
            app = make_app(engine, settings)
            said = app.state.server.formats.said
            ready = Announcement(url_of(settings, listener), engine, said)
        except BaseException:
            await engine.shutdown()
            raise
        server = _Server(app, settings, lambda: announce(ready))
        supervisor = Supervisor(server.state, lambda: start_engine(config))
        try:
            return await _serve(server, listener, stop, supervisor)
        finally:
            # Not the first one, if it died and was replaced.
            await server.state.engine.shutdown()


async def _serve(
    server: _Server, listener: socket.socket, stop: asyncio.Event, supervisor: Supervisor
) -> int:
    state = server.state
    serving = asyncio.create_task(server.serve([listener]))
    stopped = asyncio.create_task(stop.wait())
    supervising = asyncio.create_task(supervisor.run())
    try:
        await asyncio.wait({serving, stopped, supervising}, return_when=asyncio.FIRST_COMPLETED)
        has_given_up = supervising.done()
        # A start that is under way is given up, or its process would outlive us.
        supervising.cancel()
        await asyncio.gather(supervising, return_exceptions=True)
        stop.clear()
        has_died = not await _drain(state, stop)
        server.should_exit = True
        await serving
    finally:
        for task in (stopped, supervising):
            task.cancel()
    return 1 if has_died or has_given_up else 0


async def _drain(state: ServerState, hurry: asyncio.Event) -> bool:
    """Lets nobody in; those inside finish, up to the bound or a second signal; aborts the rest.

    Returns whether the engine lived until it was told to end.
    """
    state.gate.close()
    logger.info("shutting down; %d requests are in flight", state.gate.num_inside)
    # A dead engine finishes nothing: what waits for it ends at once, with the error.
    bound_s = 0.0 if state.engine.errored else state.settings.shutdown_timeout_s
    waiting = asyncio.ensure_future(state.gate.wait_empty(bound_s))
    hurrying = asyncio.ensure_future(hurry.wait())
    await asyncio.wait({waiting, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    for task in (waiting, hurrying):
        task.cancel()
    if state.gate.num_inside:
        logger.warning("aborting %d requests that are still in flight", state.gate.num_inside)
    is_alive = not state.engine.errored
    # What is aborted ends with a last output, so that its response ends as it should.
    await state.engine.shutdown()
    await state.gate.wait_empty(_LAST_BYTES_S)
    return is_alive


async def _unless_stopped(
    starting: Awaitable[AsyncEngine], stop: asyncio.Event
) -> AsyncEngine | None:
    """The engine, or None if a signal came while it started."""
    task = asyncio.ensure_future(starting)
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for each in (task, stopped):
            each.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn raises them again at its end, so that the status is not 0."""

    def __init__(
        self, app: FastAPI, settings: ServerSettings, on_listening: Callable[[], None]
    ) -> None:
        super().__init__(_uvicorn_config(app, settings))
        self.state: ServerState = app.state.server
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then says so: whoever reads the address may connect at once."""
        await super().startup(sockets)
        _forget_modules()
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _forget_modules() -> None:
    """Lets the garbage collector skip what is there for good: modules, routes, the tokenizer."""
    gc.collect()
    gc.freeze()


def _uvicorn_config(app: FastAPI, settings: ServerSettings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=int(_LAST_BYTES_S),
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        server_header=False,
        ws="none",
    )


@contextlib.contextmanager
def _on_signals(handler: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


def _cannot_bind(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {host}:{port}: {error.strerror or error}; "
        "choose another --host or --port"
    )
