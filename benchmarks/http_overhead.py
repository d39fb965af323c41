"""What HTTP and tokenization cost: the same requests to the engine itself and over the server.

python benchmarks/http_overhead.py
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.served import Server, ask, cpu_s, processes_of, serving

if TYPE_CHECKING:
    from quire.core.engine.async_engine import AsyncEngine

TEXT = "def read(path):\n    with open(path) as file:\n        return "
NUM_AT_REST = 30


def main(
    streams: Annotated[int, typer.Option(help="concurrent streams")] = 64,
    tokens: Annotated[int, typer.Option(help="output tokens of each")] = 64,
    rounds: Annotated[int, typer.Option()] = 5,
    model: Annotated[str, typer.Option()] = "demo",
    device: Annotated[str, typer.Option()] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Alternates both, round by round, on two engines of which one always rests."""
    settings = {"streams": streams, "tokens": tokens, "rounds": rounds, "model": model}
    record = Record(name=f"http_overhead_{streams}", settings={**settings, "device": device})
    options = ("--device", device, "--num-threads", "1", "--cache-memory-bytes", "256M")
    with serving(model, options) as server:
        times = asyncio.run(_measure(server, streams, tokens, rounds, model, device))
    _note(record, times, streams)
    record.show()
    print(f"written to {record.write(out)}")


async def _measure(
    server: Server, streams: int, tokens: int, rounds: int, model: str, device: str
) -> dict[str, list[float]]:
    from quire.core.config import EngineConfig
    from quire.core.engine.async_engine import AsyncEngine

    config = EngineConfig(model=model, device=device, num_threads=1, cache_memory_bytes=256 << 20)
    engine = await AsyncEngine.start(config)
    ids = await engine.encode(TEXT)
    names = ("engine", "http", "engine_rest", "http_rest", "server_cpu", "core_cpu")
    times: dict[str, list[float]] = {name: [] for name in names}
    processes = processes_of(server)
    try:
        for number in range(rounds + 1):
            direct = [_direct(engine, ids, tokens, f"{number}-{i}") for i in range(streams)]
            rates = [await _rate(direct)]
            before_s = [cpu_s(process) for process in processes]
            rates.append(await _rate([_served(server, tokens) for _ in range(streams)]))
            spent_us = [
                (cpu_s(process) - begun_s) / (streams * tokens) * 1e6
                for process, begun_s in zip(processes, before_s, strict=True)
            ]
            rests = await _at_rest(engine, server, ids, number)
            if number:  # the first warms up
                for name, value in zip(names, [*rates, *rests, *spent_us], strict=True):
                    times[name].append(value)
    finally:
        await engine.shutdown()
    return times


async def _rate(works: list[Any]) -> float:
    """Tokens a second of all together; each work tells its own tokens."""
    begun_s = time.perf_counter()
    counts = [count for _, count in await asyncio.gather(*works)]
    return sum(counts) / (time.perf_counter() - begun_s)


async def _direct(engine: AsyncEngine, ids: list[int], tokens: int, name: str) -> tuple[float, int]:
    """Seconds to the first token, and tokens: from ids, without making text."""
    from quire import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begun_s, first_s = time.perf_counter(), 0.0
    async for _ in engine.generate({"prompt_token_ids": ids}, params, name):
        first_s = first_s or time.perf_counter()
    return first_s - begun_s, tokens


async def _served(server: Server, tokens: int) -> tuple[float, int]:
    body = {"prompt": TEXT, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}
    answer = await ask(server, body)
    assert answer.is_good, answer
    return answer.first_s - answer.sent_s, tokens


async def _at_rest(engine: AsyncEngine, server: Server, ids: list[int], number: int) -> list[float]:
    """Median milliseconds to the first token, one request at a time, in turn."""
    direct, served = [], []
    for index in range(NUM_AT_REST):
        direct.append((await _direct(engine, ids, 1, f"rest-{number}-{index}"))[0])
        served.append((await _served(server, 1))[0])
    return [median(direct) * 1000.0, median(served) * 1000.0]


def _note(record: Record, times: dict[str, list[float]], streams: int) -> None:
    work, unit = f"{streams} concurrent streams", "output tokens/s"
    alone = Measurement(work=work, subject="engine", unit=unit, values=tuple(times["engine"]))
    served = Measurement(work=work, subject="over HTTP", unit=unit, values=tuple(times["http"]))
    record.measurements += [
        alone,
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
        )
    ]
    record.ratios.append(paired_ratio(work, served, alone))
    added = [a - b for a, b in zip(times["http_rest"], times["engine_rest"], strict=True)]
    record.facts["added_first_token_ms_median"] = round(median(added), 3)
    # Beside other work on the same cores both processes share what one could have had alone.
    record.facts["load_average"] = [round(value, 1) for value in os.getloadavg()]
    record.facts["throughput_kept"] = round(record.ratios[0].median, 3)


if __name__ == "__main__":
    typer.run(main)
