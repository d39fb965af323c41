"""What streams do to each other, to slow clients and to those that leave."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from contextlib import asynccontextmanager

import pytest
from asking import LeavingClient, connected
from fake_engine import REPLY, FakeEngine

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine
from quire.core.serving.answers.message_answers import PING
from quire.core.serving.http.app import make_app
from quire.core.serving.http.sse import KEEP_ALIVE, EventStream, StreamStyle
from quire.core.serving.lifecycle import bind
from quire.core.serving.settings import ServerSettings

MESSAGES = [{"role": "user", "content": "a"}]


class SlowWire:
    """An ASGI client that takes an event only when it is told to."""

    def __init__(self) -> None:
        self.may_take = asyncio.Semaphore(0)
        self.taken: list[bytes] = []
        self.has_taken = asyncio.Event()

    async def receive(self) -> dict:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: dict) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            await self.may_take.acquire()
            self.taken.append(message["body"])
            self.has_taken.set()


@asynccontextmanager
async def nobody():
    yield


async def test_slow_client_is_not_read_ahead_of():
    """The generator is asked for the next event only once the last one is taken."""
    num_made = 0

    async def bodies():
        nonlocal num_made
        for _ in range(1000):
            num_made += 1
            yield b"x" * 1000

    wire = SlowWire()
    stream = EventStream(bodies(), owner=nobody(), keep_alive_s=3600)
    task = asyncio.create_task(stream({"type": "http"}, wire.receive, wire.send))
    for taken in range(1, 20):
        wire.may_take.release()
        await wire.has_taken.wait()
        wire.has_taken.clear()
        assert num_made <= taken + 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_silent_stream_is_kept_alive_and_a_slow_client_is_not_flooded():
    """A comment comes while nothing else does; none piles up behind a client that takes nothing."""
    goes_on = asyncio.Event()

    async def bodies():
        yield b"1"
        await goes_on.wait()
        yield b"2"

    wire = SlowWire()
    stream = EventStream(bodies(), owner=nobody(), keep_alive_s=0.001)
    task = asyncio.create_task(stream({"type": "http"}, wire.receive, wire.send))
    wire.may_take.release()
    while len(wire.taken) < 4:
        wire.has_taken.clear()
        wire.may_take.release()
        await wire.has_taken.wait()
    assert wire.taken[0] == b"data: 1\n\n"
    assert set(wire.taken[1:]) == {KEEP_ALIVE}
    goes_on.set()
    for _ in range(8):
        wire.may_take.release()
    await task
    kept = [body for body in wire.taken if body != KEEP_ALIVE]
    assert kept == [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]


@pytest.mark.parametrize(
    ("path", "fields", "sign"),
    [
        ("/v1/completions", {"prompt": "a"}, KEEP_ALIVE),
        ("/v1/chat/completions", {"messages": MESSAGES}, KEEP_ALIVE),
        ("/v1/responses", {"input": "a"}, KEEP_ALIVE),
        ("/generate_stream", {"inputs": "a"}, KEEP_ALIVE),
        ("/v1/messages", {"model": "fake", "max_tokens": 5, "messages": MESSAGES}, PING),
    ],
)
async def test_every_stream_is_kept_alive(path, fields, sign):
    """While the engine says nothing, each API sends its sign of life, at the interval that was set."""
    engine = FakeEngine(hold=asyncio.Event(), hold_after=0)
    async with connected(engine, keep_alive_s=0.001) as client:
        streams = {} if path == "/generate_stream" else {"stream": True}
        leaving = LeavingClient(client.app, path, {**fields, **streams})
        task = asyncio.create_task(leaving.run())
        async with asyncio.timeout(30):
            while not any(message.get("body") == sign for message in leaving.sent[4:]):
                leaving.has_events.clear()
                await leaving.has_events.wait()
        leaving.leaves.set()
        await task
    assert engine.num_unfinished == 0


async def test_keep_alive_is_what_the_style_says():
    """An API with an event of its own for this sends that."""
    goes_on = asyncio.Event()

    async def bodies():
        await goes_on.wait()
        yield b"end"

    wire = SlowWire()
    style = StreamStyle(frame=bytes, keep_alive=b"event: ping\n\n", end=b"")
    stream = EventStream(bodies(), owner=nobody(), style=style, keep_alive_s=0.001)
    task = asyncio.create_task(stream({"type": "http"}, wire.receive, wire.send))
    wire.may_take.release()
    await wire.has_taken.wait()
    assert wire.taken == [b"event: ping\n\n"]
    goes_on.set()
    for _ in range(8):
        wire.may_take.release()
    await task
    assert wire.taken[-1] == b"end"


async def test_client_that_reads_nothing_harms_nobody():
    """While one client takes no byte, others are answered in full, and what waits stays one output."""
    engine = FakeEngine(reply=lambda ids, index: REPLY * 20)
    async with connected(engine) as client:
        stuck = SlowWire()
        body = json.dumps({"prompt": "a", "stream": True, "max_tokens": 200}).encode()
        scope = _scope("/v1/completions")
        received = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict:
            for message in received:
                return message
            return await stuck.receive()

        task = asyncio.create_task(client.app(scope, receive, stuck.send))
        for _ in range(5):
            answer = await client.post("/v1/completions", json={"prompt": "b"})
            assert answer.status_code == 200
        assert stuck.taken == []
        [stream] = engine.streams.values()
        assert len(stream._waiting) <= 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert engine.num_unfinished == 0


# ------------------------------------------------------------------------- the real engine


@asynccontextmanager
async def served_engine(**changes):
    """The real engine on the device that computes nothing, behind a real socket in this loop."""
    import uvicorn

    config = EngineConfig(model="demo", device="null", max_num_seqs=64, **changes)
    engine = await AsyncEngine.start(config)
    listener = bind("127.0.0.1", 0)
    # What the kernel keeps for a client that does not read is small: the rest is the server's.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    listener.listen(1024)
    app = make_app(engine, ServerSettings())
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
    app.state.http = server.server_state
    task = asyncio.create_task(server._serve([listener]))
    try:
        yield engine, app, listener.getsockname()[1]
    finally:
        server.should_exit = True
        await task
        await engine.shutdown()


async def stream_once(port: int, rng: random.Random, number: int, *, is_cut: bool) -> bool:
    """One streamed completion over a bare socket; cut off at random, or read to its end."""
    body = {
        "prompt": f"def number_{number}(",
        "stream": True,
        "max_tokens": rng.randint(2, 40),
        "ignore_eos": True,
        "n": rng.choice([1, 1, 2]),
    }
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        if is_cut:
            for _ in range(rng.randint(0, 12)):
                if not await reader.readline():
                    break
            return True
        answer = await reader.read()
        assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), answer[-500:]
        return True
    finally:
        writer.close()
        if is_cut:
            writer.transport.abort()


async def check_nothing_is_left(engine: AsyncEngine, app, tasks_before: set[asyncio.Task]) -> None:
    """No request in front or core, nobody inside the gate, no block in use, no task of a request."""
    async with asyncio.timeout(60):
        assert await app.state.server.gate.wait_empty(60)
        while True:
            numbers = await engine.statistics()
            if not (numbers.num_running or numbers.num_waiting or numbers.cache_usage):
                break
            await asyncio.sleep(0.01)
    assert engine._streams == {}
    assert engine._front.outputs.num_unfinished == 0
    async with asyncio.timeout(60):
        while left := [t for t in asyncio.all_tasks() - tasks_before if not t.done()]:
            await asyncio.wait(left, timeout=1)


async def run_storm(num_streams: int, rng_seed: int) -> None:
    rng = random.Random(rng_seed)
    async with served_engine() as (engine, app, port):
        before = asyncio.all_tasks()
        cut = set(rng.sample(range(num_streams), num_streams // 3))
        streams = [
            stream_once(port, random.Random(number), number, is_cut=number in cut)
            for number in range(num_streams)
        ]
        async with asyncio.timeout(400):
            answers = await asyncio.gather(*streams)
        assert all(answers)
        await check_nothing_is_left(engine, app, before)


@pytest.mark.timeout(300)
async def test_streams_that_are_cut_off_leave_nothing():
    """Of 60 streams at once a third is cut off: the others end well, and nothing is left of any."""
    await run_storm(60, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_five_hundred_streams_that_are_cut_off_leave_nothing():
    """The same with 500."""
    await run_storm(500, 2)


def _scope(path: str) -> dict:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("server", 80),
        "state": {},
    }


async def read_one_byte_a_second(port: int, seconds: int, is_slow: asyncio.Event) -> bytes:
    """A stream whose client takes a byte a second, and later all that is left."""
    body = {"prompt": "def f(", "stream": True, "max_tokens": 400, "logprobs": 20, "n": 16}
    data = json.dumps({**body, "ignore_eos": True}).encode()
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    first = b""
    for _ in range(seconds):
        first += await reader.readexactly(1)
        is_slow.set()
        await asyncio.sleep(1)  # the pace is what is tested
    rest = await reader.read()
    writer.close()
    return first + rest


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_clients_that_read_one_byte_a_second_harm_nobody_and_lose_nothing():
    """Others are answered meanwhile, the server holds little for the slow, and they get all."""
    async with served_engine() as (engine, app, port):
        before, held = asyncio.all_tasks(), [0]
        events = [asyncio.Event() for _ in range(4)]
        slow = [asyncio.create_task(read_one_byte_a_second(port, 10, event)) for event in events]
        await asyncio.gather(*(event.wait() for event in events))
        for number in range(20):
            assert await stream_once(port, random.Random(number), number, is_cut=False)
            assert not any(task.done() for task in slow)
            waiting = [
                each.transport.get_write_buffer_size() for each in app.state.http.connections
            ]
            held.append(max(waiting, default=0))
        answers = await asyncio.gather(*slow)
        assert max(held) < 256 * 1024
        for answer in answers:
            told = re.findall(rb'"token_logprobs":\[([^]]*)\]', answer)
            assert sum(row.count(b",") + 1 for row in told if row) == 400 * 16
        assert all(answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") for answer in answers)
        await check_nothing_is_left(engine, app, before)
