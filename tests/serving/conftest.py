"""A fake engine, and a client of a server around it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
from asking import connected
from fake_engine import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine) -> AsyncIterator[httpx.AsyncClient]:
    async with connected(engine) as client:
        yield client
