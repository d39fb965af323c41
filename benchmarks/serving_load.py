"""A server under full load for long: its memory over time.

python benchmarks/serving_load.py soak --duration-s 600
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Annotated

import typer

from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.served import Server, ask, make_body, processes_of, serving

app = typer.Typer(no_args_is_help=True)
OPTIONS = ("--num-threads", "1", "--cache-memory-bytes", "256M")


@app.callback()
def main() -> None:
    """What a server does under load for long."""


@app.command()
def soak(
    model: Annotated[str, typer.Option()] = "demo",
    clients: Annotated[int, typer.Option()] = 32,
    duration_s: Annotated[float, typer.Option()] = 600.0,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Full load, a third of it cut off; memory of server and core by the minute."""
    with serving(model, OPTIONS) as server:
        sizes, number = asyncio.run(_soak(server, clients, duration_s))
    record = Record(name="serving_soak", settings={"clients": clients, "duration_s": duration_s})
    record.measurements += [
        Measurement(work="full load", subject=name, unit="MiB resident", values=tuple(values))
        for name, values in sizes.items()
    ]
    half = {name: values[len(values) // 2 :] for name, values in sizes.items()}
    record.facts["requests"] = number
    for name, values in half.items():
        record.facts[f"growth_in_second_half_{name}"] = round(values[-1] / values[0] - 1.0, 4)
    record.show()
    print(f"written to {record.write(out)}")


async def _soak(
    server: Server, clients: int, duration_s: float
) -> tuple[dict[str, list[float]], int]:
    end_s, number = time.monotonic() + duration_s, 0
    sizes: dict[str, list[float]] = {"server": [], "core": []}

    async def client(seed: int) -> None:
        nonlocal number
        rng = random.Random(seed)
        while time.monotonic() < end_s:
            work = asyncio.ensure_future(ask(server, make_body(rng, 64)))
            patience_s = 0.2 if rng.random() < 1 / 3 else None
            await asyncio.wait({work}, timeout=patience_s)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            number += 1

    working = asyncio.gather(*(client(seed) for seed in range(clients)))
    pause_s = duration_s / 20
    while time.monotonic() < end_s:
        await asyncio.sleep(pause_s)
        for name, process in zip(sizes, processes_of(server), strict=True):
            sizes[name].append(process.memory_info().rss / 2**20)
    await working
    return sizes, number


if __name__ == "__main__":
    app()
