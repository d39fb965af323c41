"""Quire beside the other engines that are installed: one model, the same loads, taken in turn.

    pip install "quire[bench]"; python benchmarks/peers.py --precision int8 --rounds 3

Weights are random, made once and written in each engine's format. Each engine has a process of its
own and the same number of threads; while one runs, the others wait. An engine that is not
installed, or fails, is named in the record with the reason. Engines that take one request at a time
run a sample of the long loads, since their rate does not depend on how many there are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from quire.benchmarks import workloads
from quire.benchmarks.peer_engines import DETERMINISTIC, PEERS, QUIRE, Outcome, Peer
from quire.benchmarks.peer_process import PeerError, PeerProcess
from quire.benchmarks.recording import Measurement, Record, paired_ratio
from quire.benchmarks.shapes import SHAPES, make_model
from quire.benchmarks.versus_transformers import LOADS, Load
from quire.benchmarks.workloads import Work

_WARM_UP = Work(list(range(20, 40)), 4)
_PACKAGES = {"llama.cpp": "llama-cpp-python", "OpenVINO GenAI": "openvino-genai"}


def main(
    precision: Annotated[str, typer.Option(help=", ".join(QUIRE.precisions))] = "int8",
    shape: Annotated[str, typer.Option(help="a Qwen2 shape")] = "qwen2-0.5b",
    rounds: Annotated[int, typer.Option(help="interleaved rounds")] = 3,
    threads: Annotated[int, typer.Option(help="of each engine; 0: one a core")] = 0,
    sample: Annotated[
        int, typer.Option(help="requests of a load that engines run that take one at a time")
    ] = 2,
    only: Annotated[str, typer.Option(help="run loads whose name contains this")] = "",
    deterministic: Annotated[
        bool, typer.Option(help="Quire with --deterministic as one more subject")
    ] = True,
    folder: Annotated[Path | None, typer.Option(help="where the model is kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write; a plot goes beside it")] = None,
) -> None:
    """Prints, records and draws the rates of all."""
    if precision not in QUIRE.precisions:
        raise typer.BadParameter(f"{precision}; there are {', '.join(QUIRE.precisions)}")
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    directory = make_model(shape, home, dtype="bfloat16")
    settings = {
        "shape": shape,
        "precision": precision,
        "rounds": rounds,
        "threads": threads or os.cpu_count() or 1,
        "sample": sample,
    }
    record = Record(name=f"peers_{shape}_{precision}", settings=settings)
    subjects = (QUIRE, *([DETERMINISTIC] if deterministic else []), *PEERS)
    started = _start(subjects, directory, record)
    try:
        for load in LOADS:
            if only in load.name:
                _measure(load, started, record)
    finally:
        for process in started.values():
            process.close()
    record.show()
    written = record.write(out)
    print(f"written to {written} and {_draw(record, written.with_suffix('.svg'))}")


def _start(subjects: Sequence[Peer], directory: Path, record: Record) -> dict[Peer, PeerProcess]:
    """Those that run the model; for the others a fact in the record."""
    precision, threads = record.settings["precision"], record.settings["threads"]
    started: dict[Peer, PeerProcess] = {}
    for peer in subjects:
        problem = peer.problem(precision)
        if problem:
            record.facts[peer.name] = problem
            continue
        process = PeerProcess(peer.name, directory, precision, threads)
        try:
            process.wait_ready()
            process.run([_WARM_UP])
        except PeerError as error:
            process.close()
            record.facts[peer.name] = f"did not run the model: {error}"
            continue
        started[peer] = process
        record.facts |= _version_of(peer)
    return started


def _version_of(peer: Peer) -> dict[str, str]:
    try:
        package = _PACKAGES.get(peer.name, "")
        return {peer.name: f"{package} {version(package)}"} if package else {}
    except PackageNotFoundError:
        return {}


def _measure(load: Load, started: dict[Peer, PeerProcess], record: Record) -> None:
    """One load by each in turn, every round; adds figures and ratios, drops who fails."""
    rates: dict[Peer, list[float]] = {peer: [] for peer in started}
    last: dict[Peer, Outcome] = {}
    size = min(load.sample, record.settings["sample"])
    for number in range(record.settings["rounds"]):
        vocab_size = SHAPES[record.settings["shape"]]["vocab_size"]
        works = load.make(np.random.default_rng(1000 + number), vocab_size)
        for peer, process in list(started.items()):
            given = works if peer.is_batching else workloads.sample_of(works, size)
            try:
                last[peer] = process.run(given)
            except PeerError as error:
                record.facts[peer.name] = f"failed at {load.name}: {error}"
                started.pop(peer).close()
                continue
            rates[peer].append(_count(load, given) / last[peer].seconds)
    rows = [_row(load, peer, rates[peer], last, size) for peer in started]
    record.measurements += rows
    record.ratios += [paired_ratio(load.name, rows[0], row) for row in rows[1:]]


def _row(
    load: Load, peer: Peer, rates: list[float], last: Mapping[Peer, Outcome], size: int
) -> Measurement:
    notes = [] if peer.is_batching else [f"one at a time, {size} of the requests"]
    ours = last.get(QUIRE)
    if ours is not None and peer is not QUIRE and len(ours.tokens) > 1:
        notes.append(_agreement(ours.tokens, last[peer].tokens))
    unit = "prompt tokens/s" if load.counts_prompt else "output tokens/s"
    return Measurement(
        work=load.name, subject=peer.name, unit=unit, values=tuple(rates), note="; ".join(notes)
    )


def _agreement(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """How far two greedy outputs are the same; each precision rounds in its own way."""
    pairs = zip(ours, theirs, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    return f"the first {same} of {len(ours)} tokens are Quire's"


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
