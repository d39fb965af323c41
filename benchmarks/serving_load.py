"""A server under more than it can do, or for long: goodput under overload, memory over time.

python benchmarks/serving_load.py overload
python benchmarks/serving_load.py soak --duration-s 600
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.served import Answer, Server, ask, processes_of, serving

app = typer.Typer(no_args_is_help=True)
OPTIONS = ("--num-threads", "1", "--cache-memory-bytes", "256M")


@app.command()
def overload(
    model: Annotated[str, typer.Option()] = "demo",
    running: Annotated[int, typer.Option(help="requests that run at once")] = 16,
    factor: Annotated[int, typer.Option(help="how many times capacity is asked")] = 10,
    tokens: Annotated[int, typer.Option()] = 32,
    seconds: Annotated[float, typer.Option(help="of each phase")] = 20.0,
    rounds: Annotated[int, typer.Option()] = 3,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Good answers a second at capacity, and at many times that; who is refused comes back."""
    queue = str(running)
    options = (*OPTIONS, "--max-num-seqs", str(running), "--max-num-queued", queue)
    rates: dict[int, list[float]] = {1: [], factor: []}
    with serving(model, options) as server:
        asyncio.run(_phase(server, running, tokens, 3.0))
        for _ in range(rounds):
            for times, values in rates.items():
                answers = asyncio.run(_phase(server, running * times, tokens, seconds))
                values.append(_goodput(answers))
    settings = {"model": model, "running": running, "factor": factor, "tokens": tokens}
    record = Record(name="serving_overload_retries", settings={**settings, "seconds": seconds})
    work, unit = f"{tokens} tokens, {running} run at once", "good answers/s"
    capacity, beyond = (
        Measurement(work=work, subject=name, unit=unit, values=tuple(values))
        for name, values in zip(("at capacity", f"at {factor} times"), rates.values(), strict=True)
    )
    record.measurements += [capacity, beyond]
    record.ratios.append(paired_ratio(work, beyond, capacity))
    record.show()
    print(f"written to {record.write(out)}")


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


async def _phase(server: Server, clients: int, tokens: int, seconds: float) -> list[Answer]:
    """So many clients, each asking again when answered; who is refused comes back as told."""
    end_s = time.monotonic() + seconds

    async def client(number: int) -> list[Answer]:
        rng, answers = random.Random(number), []
        while time.monotonic() < end_s:
            answer = await ask(server, _body(rng, tokens))
            answers.append(answer)
            if answer.status == 429:
                await asyncio.sleep(rng.uniform(0.5, 1.5))  # Retry-After is one second
        return answers

    found = await asyncio.gather(*(client(number) for number in range(clients)))
    return [answer for answers in found for answer in answers]


def _goodput(answers: list[Answer]) -> float:
    good = [answer for answer in answers if answer.is_good]
    wrong = {answer.status for answer in answers} - {200, 429}
    assert not wrong, f"under overload the server answered {wrong}"
    return len(good) / (max(a.end_s for a in good) - min(a.sent_s for a in answers))


async def _soak(
    server: Server, clients: int, duration_s: float
) -> tuple[dict[str, list[float]], int]:
    end_s, number = time.monotonic() + duration_s, 0
    sizes: dict[str, list[float]] = {"server": [], "core": []}

    async def client(seed: int) -> None:
        nonlocal number
        rng = random.Random(seed)
        while time.monotonic() < end_s:
            work = asyncio.ensure_future(ask(server, _body(rng, 64)))
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


def _body(rng: random.Random, tokens: int) -> dict[str, Any]:
    words = rng.choices(("list", "file", "name", "index", "value", "return"), k=16)
    prompt = f"def {'_'.join(words)}(value):\n    "
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True}


if __name__ == "__main__":
    app()
