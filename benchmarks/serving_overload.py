"""Goodput under ten times the load a server can take, of clients that do not wait for each other.

First capacity: as many clients as run at once, each asking again when answered. Then arrivals of a
Poisson process at multiples of it. Who is refused (429) is counted and does not come back. Good is
an answer that came whole, with its first token and the mean gap between tokens within limits.
Connections are kept, and the client counts bytes and parses none, since on few cores what it
computes is taken from the server; the CPU time of each process is reported beside.

python benchmarks/serving_overload.py
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import typer

from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.served import Answer, Server, cpu_s, make_body, processes_of, serving

OPTIONS = ("--num-threads", "1", "--cache-memory-bytes", "256M")
WARM_UP_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an answer must keep to count."""

    tokens: int
    ttft_s: float
    gap_s: float

    def hold(self, answer: Answer) -> bool:
        """Whether an answer came, and soon enough."""
        mean_gap_s = (answer.end_s - answer.first_s) / max(self.tokens - 1, 1)
        waited_s = answer.first_s - answer.sent_s
        return answer.is_good and waited_s <= self.ttft_s and mean_gap_s <= self.gap_s


@dataclass(slots=True)
class Phase:
    """What came of the requests sent in a stretch of time, and what each process computed."""

    answers: list[Answer]
    seconds: float
    cpu_us: dict[str, float] = field(default_factory=dict)

    def goodput(self, limits: Limits) -> float:
        """Good answers a second, of those that ended within the phase."""
        wrong = {answer.status for answer in self.answers} - {200, 429}
        assert not wrong, f"under overload the server answered {wrong}"
        return sum(map(limits.hold, self.answers)) / self.seconds

    @property
    def num_refused(self) -> int:
        """How many heard 429."""
        return sum(answer.status == 429 for answer in self.answers)


class Connections:
    """Connections to a server that are kept for the next request."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, body: dict[str, Any]) -> Answer:
        """One streamed completion."""
        sent_s = time.monotonic()
        reader, writer = await self._take()
        raw = json.dumps({**body, "stream": True}).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: s\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(raw), raw)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status, first_s, num_events = int(head[9:12]), 0.0, 0
        if b"content-length: " in head:
            await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
        else:
            first_s, num_events = await _read_events(reader)
        self._free.append((reader, writer))
        end_s = time.monotonic()
        return Answer(
            status=status,
            sent_s=sent_s,
            first_s=first_s or end_s,
            end_s=end_s,
            num_events=num_events,
        )

    def close(self) -> None:
        """Ends those that are free."""
        for _, writer in self._free:
            writer.close()

    async def _take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The connection used last: servers close those that were idle for long."""
        while self._free:
            reader, writer = self._free.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return await self._open()

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._server.host, self._server.port)


async def _read_events(reader: asyncio.StreamReader) -> tuple[float, int]:
    """When the first event came, and how many did."""
    first_s, num_events, tail = 0.0, 0, b""
    while not tail.endswith(b"\r\n0\r\n\r\n"):
        data = await reader.read(65536)
        if not data:
            raise ConnectionError("the server closed a stream before its end")
        first_s = first_s or time.monotonic()
        num_events += data.count(b"data: {")
        tail = (tail + data)[-7:]
    return first_s, num_events


def main(
    model: Annotated[str, typer.Option()] = "demo",
    device: Annotated[str, typer.Option()] = "auto",
    running: Annotated[int, typer.Option(help="requests that run at once")] = 16,
    tokens: Annotated[int, typer.Option(help="output tokens of each")] = 256,
    seconds: Annotated[float, typer.Option(help="of each phase")] = 8.0,
    rounds: Annotated[int, typer.Option()] = 3,
    ttft_limit_s: Annotated[float, typer.Option(help="to the first token")] = 3.0,
    gap_limit_ms: Annotated[float, typer.Option(help="mean time between tokens")] = 50.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Capacity, once and ten times its rate, round by round on one server."""
    limits = Limits(tokens=tokens, ttft_s=ttft_limit_s, gap_s=gap_limit_ms / 1000.0)
    queued = ("--max-num-seqs", str(running), "--max-num-queued", str(running))
    phases: dict[str, list[Phase]] = {"at capacity": [], "at 1 times": [], "at 10 times": []}
    with serving(model, (*OPTIONS, "--device", device, *queued)) as server:
        asyncio.run(_closed(server, running, tokens, WARM_UP_S))
        for number in range(rounds):
            closed = _accounted(server, partial(_closed, server, running, tokens, seconds))
            phases["at capacity"].append(closed)
            for name, factor in (("at 1 times", 1), ("at 10 times", 10)):
                rate = factor * closed.goodput(limits)
                assert rate > 0, "nothing was good at capacity; give it wider limits"
                phases[name].append(
                    _accounted(server, partial(_open, server, rate, tokens, seconds, number))
                )
    settings = {"model": model, "device": device, "running": running, "tokens": tokens}
    settings |= {"seconds": seconds, "ttft_limit_s": ttft_limit_s, "gap_limit_ms": gap_limit_ms}
    record = Record(name="serving_overload", settings=settings)
    _note(record, phases, limits)
    record.show()
    print(f"written to {record.write(out)}")


def _accounted(server: Server, work: Callable[[], Coroutine[Any, Any, Phase]]) -> Phase:
    processes = dict(zip(("server", "core"), processes_of(server), strict=True))
    processes["client"] = psutil.Process()
    before_s = {name: cpu_s(process) for name, process in processes.items()}
    phase = asyncio.run(work())
    phase.cpu_us = {name: (cpu_s(p) - before_s[name]) * 1e6 for name, p in processes.items()}
    return phase


async def _closed(server: Server, clients: int, tokens: int, seconds: float) -> Phase:
    """So many clients, each asking again when it is answered."""
    connections, begun_s = Connections(server), time.monotonic()

    async def client(seed: int) -> list[Answer]:
        rng, answers = random.Random(seed), []
        while time.monotonic() < begun_s + seconds:
            answers.append(await connections.ask(make_body(rng, tokens)))
        return answers

    found = await asyncio.gather(*map(client, range(clients)))
    connections.close()
    answers = [answer for answers in found for answer in answers]
    return Phase(_ended_within(answers, begun_s, seconds), seconds)


async def _open(server: Server, rate: float, tokens: int, seconds: float, seed: int) -> Phase:
    """Arrivals of a Poisson process; each is late only by what the loop is."""
    connections, rng, begun_s = Connections(server), random.Random(seed), time.monotonic()
    asked: list[asyncio.Task[Answer]] = []
    next_s = begun_s
    while (next_s := next_s + rng.expovariate(rate)) < begun_s + seconds:
        await asyncio.sleep(max(next_s - time.monotonic(), 0.0))
        asked.append(asyncio.create_task(connections.ask(make_body(rng, tokens))))
    answers = await asyncio.gather(*asked)
    connections.close()
    return Phase(_ended_within(answers, begun_s, seconds), seconds)


def _ended_within(answers: Sequence[Answer], begun_s: float, seconds: float) -> list[Answer]:
    return [answer for answer in answers if answer.end_s <= begun_s + seconds]


def _note(record: Record, phases: dict[str, list[Phase]], limits: Limits) -> None:
    work = f"{limits.tokens} tokens, {record.settings['running']} run at once"
    record.measurements += [
        Measurement(
            work=work,
            subject=name,
            unit="good answers/s",
            values=tuple(phase.goodput(limits) for phase in found),
        )
        for name, found in phases.items()
    ]
    capacity, *beyond = record.measurements
    record.ratios += [paired_ratio(work, one, capacity) for one in beyond]
    for name, found in phases.items():
        key = name.replace(" ", "_")
        record.facts[f"refused_a_second_{key}"] = round(
            median(phase.num_refused / phase.seconds for phase in found), 1
        )
        late = [sum(a.is_good and not limits.hold(a) for a in phase.answers) for phase in found]
        record.facts[f"answered_beyond_limits_{key}"] = sum(late)
        for process in ("server", "core", "client"):
            shares = [phase.cpu_us[process] / phase.seconds / 1e6 for phase in found]
            record.facts[f"cpu_share_of_{process}_{key}"] = round(median(shares), 3)
    record.facts["load_average"] = [round(value, 1) for value in os.getloadavg()]


if __name__ == "__main__":
    typer.run(main)
