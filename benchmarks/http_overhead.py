"""What HTTP and tokenization cost: the same requests to the engine itself and over the server.

Streams are kept up: each asks again when it is answered, so that beginnings are spread as under a
steady load. Three ways are measured in turn: the engine from ids to ids, the engine from text to
text, and the server. In all of them the core has a process of its own; over the server the
client has one too, which counts events and parses none.

On few cores the throughput kept is bounded by what the client computes, which is no cost of HTTP:
it is the core's share of a processor that the client takes. So the CPU time of each of the three
processes is reported beside it, and what the server's is of the core's.

python benchmarks/http_overhead.py
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.served import Server, ask, cpu_s, processes_of, serving

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine

AskOnce = Callable[[int, str], Awaitable[float]]
"""Asks for so many tokens, under a name of its own."""
TEXT = "def read(path):\n    with open(path) as file:\n        return "
NUM_AT_REST = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is asked in one measurement."""

    streams: int
    tokens: int
    requests: int

    @property
    def num_tokens(self) -> int:
        """Of all requests of all streams."""
        return self.streams * self.tokens * self.requests


def main(
    streams: Annotated[int, typer.Option(help="concurrent streams")] = 64,
    tokens: Annotated[int, typer.Option(help="output tokens of each")] = 64,
    requests: Annotated[int, typer.Option(help="of each stream, one after the other")] = 3,
    rounds: Annotated[int, typer.Option()] = 5,
    model: Annotated[str, typer.Option()] = "demo",
    device: Annotated[str, typer.Option()] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Alternates all, round by round, on two engines of which one always rests."""
    load = Load(streams=streams, tokens=tokens, requests=requests)
    settings = {**asdict(load), "rounds": rounds, "model": model}
    record = Record(name=f"http_overhead_{streams}", settings={**settings, "device": device})
    options = ("--device", device, "--num-threads", "1", "--cache-memory-bytes", "256M")
    with serving(model, options) as server:
        times = asyncio.run(_measure(server, load, rounds, model, device))
    _note(record, times, streams)
    record.show()
    print(f"written to {record.write(out)}")


async def _measure(
    server: Server, load: Load, rounds: int, model: str, device: str
) -> dict[str, list[float]]:
    from quire.core.config import EngineConfig
    from quire.core.engine.async_engine import AsyncEngine

    config = EngineConfig(model=model, device=device, num_threads=1, cache_memory_bytes=256 << 20)
    engine = await AsyncEngine.start(config)
    ids = await engine.encode(TEXT)
    names: tuple[str, ...] = ("engine", "text", "http", "engine_rest", "http_rest")
    names += ("server_cpu", "core_cpu", "client_cpu")
    times: dict[str, list[float]] = {name: [] for name in names}
    processes, client = processes_of(server), psutil.Process()
    try:
        for number in range(rounds + 1):
            rates = [
                await _rate(load, partial(_direct, engine, prompt, name=f"{kind}-{number}"))
                for kind, prompt in (("ids", {"prompt_token_ids": ids}), ("text", TEXT))
            ]
            before_s = [cpu_s(process) for process in (*processes, client)]
            rates.append(await _rate(load, lambda tokens, _: _served(server, tokens)))
            spent_us = [
                (cpu_s(process) - begun_s) / load.num_tokens * 1e6
                for process, begun_s in zip((*processes, client), before_s, strict=True)
            ]
            rests = await _at_rest(engine, server, ids, number)
            if number:  # the first warms up
                for name, value in zip(names, [*rates, *rests, *spent_us], strict=True):
                    times[name].append(value)
    finally:
        await engine.shutdown()
    return times


async def _rate(load: Load, ask_once: AskOnce) -> float:
    """Tokens a second of all streams together."""

    async def stream(number: int) -> None:
        for index in range(load.requests):
            await ask_once(load.tokens, f"{number}-{index}")

    begun_s = time.perf_counter()
    await asyncio.gather(*map(stream, range(load.streams)))
    return load.num_tokens / (time.perf_counter() - begun_s)


async def _direct(
    engine: AsyncEngine, prompt: str | dict[str, Any], tokens: int, suffix: str, *, name: str
) -> float:
    """Seconds to the first token: from text to text, or from ids to ids."""
    from quire import SamplingParams

    makes_text = isinstance(prompt, str)
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=makes_text
    )
    begun_s, first_s = time.perf_counter(), 0.0
    async for _ in engine.generate(prompt, params, f"{name}-{suffix}"):
        first_s = first_s or time.perf_counter()
    return first_s - begun_s


async def _served(server: Server, tokens: int) -> float:
    body = {"prompt": TEXT, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    answer = await ask(server, body)
    assert answer.is_good, answer
    return answer.first_s - answer.sent_s


async def _at_rest(engine: AsyncEngine, server: Server, ids: list[int], number: int) -> list[float]:
    """Median milliseconds to the first token, one request at a time, in turn."""
    direct, served = [], []
    for index in range(NUM_AT_REST):
        prompt = {"prompt_token_ids": ids}
        direct.append(await _direct(engine, prompt, 1, str(index), name=f"rest-{number}"))
        served.append(await _served(server, 1))
    return [median(direct) * 1000.0, median(served) * 1000.0]


def _note(record: Record, times: dict[str, list[float]], streams: int) -> None:
    work, unit = f"{streams} concurrent streams", "output tokens/s"
    alone = Measurement(work=work, subject="engine", unit=unit, values=tuple(times["engine"]))
    text = Measurement(
        work=work, subject="engine with text", unit=unit, values=tuple(times["text"])
    )
    served = Measurement(work=work, subject="over HTTP", unit=unit, values=tuple(times["http"]))
    record.measurements += [
        alone,
        text,
        served,
        *(
            Measurement(
                work="one request at rest",
                subject=subject,
                unit="ms to the first token",
                values=tuple(times[name]),
            )
            for subject, name in (("engine", "engine_rest"), ("over HTTP", "http_rest"))
        ),
    ]
    record.measurements += [
        Measurement(work=work, subject=subject, unit="us of CPU a token", values=tuple(times[name]))
        for subject, name in (
            ("process of HTTP and text", "server_cpu"),
            ("process of the engine core", "core_cpu"),
            ("process of the client", "client_cpu"),
        )
    ]
    shares = [a / b for a, b in zip(times["server_cpu"], times["core_cpu"], strict=True)]
    record.facts["server_cpu_over_core_cpu_median"] = round(median(shares), 3)
    record.ratios += [paired_ratio(work, served, alone), paired_ratio(work, served, text)]
    added = [a - b for a, b in zip(times["http_rest"], times["engine_rest"], strict=True)]
    record.facts["added_first_token_ms_median"] = round(median(added), 3)
    # Beside other work on the same cores both processes share what one could have had alone.
    record.facts["load_average"] = [round(value, 1) for value in os.getloadavg()]
    record.facts["throughput_kept"] = round(record.ratios[0].median, 3)


if __name__ == "__main__":
    typer.run(main)
