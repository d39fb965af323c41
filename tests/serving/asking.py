"""Ways to ask a server around a fake engine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn
from fake_engine import FakeEngine

from quire.core.serving.http.app import make_app
from quire.core.serving.lifecycle import bind
from quire.core.serving.settings import ServerSettings


@asynccontextmanager
async def connected(engine: FakeEngine, **settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server around `engine`, without a socket."""
    app = make_app(engine, ServerSettings(**settings))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        client.app = app
        yield client


def events_of(response: httpx.Response) -> list:
    """The events of a finished stream, parsed; holds it to the format."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def error_of(response: httpx.Response, status: int) -> dict:
    """The error of a response; holds it to the form of the OpenAI API."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@contextmanager
def served_in_thread(engine: FakeEngine, **settings) -> Iterator[str]:
    """The address of a server with a real socket, in a thread of this process."""
    listener = bind("127.0.0.1", 0)
    listener.listen()  # who connects before the thread runs waits instead of being refused
    app = make_app(engine, ServerSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


class LeavingClient:
    """An ASGI client that sends one request and leaves once it is told to."""

    def __init__(self, app, path: str, body: dict) -> None:
        self._app, self._path = app, path
        self._body = json.dumps(body).encode()
        self._is_body_sent = False
        self.leaves = asyncio.Event()
        self.sent: list[dict] = []
        self.has_events = asyncio.Event()

    async def run(self) -> None:
        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("server", 80),
            "state": {},
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict:
        if not self._is_body_sent:
            self._is_body_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.has_events.set()
