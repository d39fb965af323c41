"""A server in its own process, and a client that costs as little as one can."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A `quire serve` that takes requests."""

    process: subprocess.Popen[str]
    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of one request."""

    status: int
    sent_s: float
    first_s: float
    """When the first event came; when the answer ended, if none did."""
    end_s: float
    num_events: int

    @property
    def is_good(self) -> bool:
        """Whether it was answered."""
        return self.status == 200 and self.num_events > 0


@contextlib.contextmanager
def serving(model: str, options: Sequence[str]) -> Iterator[Server]:
    """Starts a server and ends it with the block."""
    command = [sys.executable, "-m", "quire", "serve", model, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            address = next(line for line in process.stderr if line.startswith("serving "))
            url = urlsplit(address.split()[-1])
            assert url.hostname is not None, address
            assert url.port is not None, address
            yield Server(process=process, host=url.hostname, port=url.port)
        finally:
            process.terminate()
            process.wait()


async def ask(server: Server, body: dict[str, Any]) -> Answer:
    """One streamed completion over a connection of its own; counts events and parses none."""
    sent_s = time.monotonic()
    reader, writer = await asyncio.open_connection(server.host, server.port)
    raw = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    writer.write(head.encode() + raw)
    status = int((await reader.readline()).split()[1])
    first_s, num_events = 0.0, 0
    while data := await reader.read(65536):
        found = data.count(b"data: {")
        if found and not num_events:
            first_s = time.monotonic()
        num_events += found
    writer.close()
    end_s = time.monotonic()
    return Answer(
        status=status, sent_s=sent_s, first_s=first_s or end_s, end_s=end_s, num_events=num_events
    )


def processes_of(server: Server) -> tuple[psutil.Process, psutil.Process]:
    """The server and its engine core, the largest of its children."""
    parent = psutil.Process(server.process.pid)
    return parent, max(parent.children(), key=lambda child: child.memory_info().rss)


def cpu_s(process: psutil.Process) -> float:
    """What a process has computed so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def make_body(rng: random.Random, tokens: int) -> dict[str, Any]:
    """A request for so many tokens, by a prompt that no cached prefix has."""
    words = rng.choices(("list", "file", "name", "index", "value", "return"), k=16)
    prompt = f"def {'_'.join(words)}(value):\n    "
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
