"""Quire beside the other engines that are installed: one model, the same loads, taken in turn.

    pip install "quire[bench]"; python benchmarks/peers.py --precision int8 --rounds 3

Weights are random, made once and written in each engine's format. An engine that is not installed,
or fails to load the model, is named in the record with the reason. Engines that take one request at
a time run a sample of the long loads, since their rate does not depend on how many there are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from quire.benchmarks import workloads
from quire.benchmarks.peer_engines import PEERS, Runner, start_quire
from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.shapes import SHAPES, make_model
from quire.benchmarks.versus_transformers import LOADS, Load
from quire.benchmarks.workloads import Work

PRECISIONS = ("bfloat16", "float16", "int8", "int4")


def main(
    precision: Annotated[str, typer.Option(help=", ".join(PRECISIONS))] = "int8",
    shape: Annotated[str, typer.Option(help="a Qwen2 shape")] = "qwen2-0.5b",
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 3,
    only: Annotated[str, typer.Option(help="run loads whose name contains this")] = "",
    deterministic: Annotated[
        bool, typer.Option(help="Quire with --deterministic as one more subject")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="where the model is kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write; a plot goes beside it")] = None,
) -> None:
    """Prints, records and draws the rates of all."""
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"{precision}; there are {', '.join(PRECISIONS)}")
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    directory = make_model(shape, home, dtype="bfloat16")
    record = Record(
        name=f"peers_{shape}_{precision}",
        settings={"shape": shape, "precision": precision, "rounds": rounds},
    )
    runners = {"quire": (start_quire(directory, precision), True)}
    if deterministic:
        runner = start_quire(directory, precision, deterministic=True)
        runners["quire --deterministic"] = (runner, True)
    runners |= _start_peers(directory, precision, record)
    warm_up = [Work(list(range(20, 40)), 4)]
    for runner, _ in runners.values():
        runner(warm_up)
    for load in LOADS:
        if only in load.name:
            _measure(load, runners, SHAPES[shape]["vocab_size"], rounds, record)
    record.show()
    written = record.write(out)
    print(f"written to {written} and {_draw(record, written.with_suffix('.svg'))}")


def _start_peers(directory: Path, precision: str, record: Record) -> dict[str, tuple[Runner, bool]]:
    """Those that run the model, and whether they batch; for the others a fact in the record."""
    started = {}
    for peer in PEERS:
        problem = peer.problem(precision)
        if not problem:
            try:
                started[peer.name] = (peer.start(directory, precision), peer.is_batching)
                continue
            # Whatever another project's loader raises is what the table has to say.
            except Exception as error:
                problem = " ".join(f"did not load the model: {error}".split())
        record.facts[peer.name] = problem
    return started


def _measure(
    load: Load,
    runners: dict[str, tuple[Runner, bool]],
    vocab_size: int,
    rounds: int,
    record: Record,
) -> None:
    """One load by each in turn, `rounds` times; adds figures and ratios to `record`."""
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds):
        works = load.make(np.random.default_rng(1000 + number), vocab_size)
        for name, (run, is_batching) in runners.items():
            given = works if is_batching else workloads.sample_of(works, load.sample)
            rates[name].append(_count(load, given) / run(given))
    unit = "prompt tokens/s" if load.counts_prompt else "output tokens/s"
    rows = [
        Measurement(
            work=load.name,
            subject=name,
            unit=unit,
            values=tuple(rates[name]),
            note="" if is_batching else f"one at a time, {load.sample} of the requests",
        )
        for name, (_, is_batching) in runners.items()
    ]
    record.measurements += rows
    record.ratios += [paired_ratio(load.name, rows[0], row) for row in rows[1:]]


def _count(load: Load, works: Sequence[Work]) -> int:
    return sum(len(w.prompt) if load.counts_prompt else w.num_tokens for w in works)


# --- the plot -------------------------------------------------------------------------------------

_BAR, _GAP, _LEFT, _WIDTH = 18, 26, 300, 760


def _draw(record: Record, target: Path) -> Path:
    """Bars of the medians, load by load, each as a part of the best of its load."""
    lines, y = [], 30
    for work in dict.fromkeys(m.work for m in record.measurements):
        rows = [m for m in record.measurements if m.work == work]
        lines.append(f'<text x="8" y="{y}" font-weight="bold">{work}, {rows[0].unit}</text>')
        best = max(row.median for row in rows)
        for row in rows:
            y += _BAR + 4
            width = (_WIDTH - _LEFT - 90) * row.median / best
            colour = "#2457a6" if row.subject.startswith("quire") else "#9aa7b8"
            lines += [
                f'<text x="24" y="{y + 13}">{row.subject}</text>',
                f'<rect x="{_LEFT}" y="{y}" width="{width:.0f}" height="{_BAR}" fill="{colour}"/>',
                f'<text x="{_LEFT + width + 6:.0f}" y="{y + 13}">{row.median:,.1f}</text>',
            ]
        y += _BAR + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y}" '
        'font-family="sans-serif" font-size="13">'
    )
    background = '<rect width="100%" height="100%" fill="white"/>'
    target.write_text("\n".join([head, background, *lines, "</svg>"]) + "\n")
    return target


if __name__ == "__main__":
    typer.run(main)
