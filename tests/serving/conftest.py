"""The server around a fake engine, asked without a socket."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine

from quire.core.serving.app import make_app
from quire.core.serving.settings import ServerSettings


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@asynccontextmanager
async def connected(engine: FakeEngine, **settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server around `engine`."""
    app = make_app(engine, ServerSettings(**settings))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        client.app = app
        yield client


@pytest.fixture
async def client(engine) -> AsyncIterator[httpx.AsyncClient]:
    async with connected(engine) as client:
        yield client


@pytest.fixture
def connect() -> Callable:
    return connected


def events_of(response: httpx.Response) -> list:
    """The events of a finished stream, parsed; holds it to the format."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]
