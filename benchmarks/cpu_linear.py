"""Which way of multiplying by a linear layer's weights is fastest on this CPU, by shape and rows.

    python benchmarks/cpu_linear.py --dtype bfloat16 --threads 2

Each figure is the best of several passes over so many copies of the weights that none of them is
still in a cache, as in a model whose layers take turns. Subjects take turns within one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from quire.backends.cpu import linear
from quire.backends.reference import ReferenceOps
from quire.benchmarks.recording import Measurement, Record

SHAPES = {
    "qkv 1152x896": (1152, 896),
    "output 896x896": (896, 896),
    "gate, up 9728x896": (9728, 896),
    "down 896x4864": (896, 4864),
    "lm head 151936x896": (151936, 896),
}
"""Of a Qwen2 with 0.5 billion parameters: outputs x inputs."""
Multiply = Callable[[Tensor], Tensor]


def main(
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    threads: Annotated[int, typer.Option()] = 1,
    rows: Annotated[str, typer.Option(help="numbers of rows, separated by commas")] = "1,8,32,128",
    rounds: Annotated[int, typer.Option(help="of each subject, interleaved")] = 5,
    cold_mib: Annotated[int, typer.Option(help="weights to rotate through")] = 96,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints GB/s of weights and GFLOP/s of every subject."""
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    record = Record(
        name=f"cpu_linear-{dtype}",
        settings={"dtype": dtype, "threads": threads, "rounds": rounds, "cold_mib": cold_mib},
    )
    with torch.inference_mode():
        for shape, (num_outputs, num_inputs) in SHAPES.items():
            size_bytes = num_outputs * num_inputs * kind.itemsize
            num_copies = max(1, min(24, (cold_mib << 20) // size_bytes))
            weights = [torch.randn(num_outputs, num_inputs).to(kind) for _ in range(num_copies)]
            subjects = dict(_subjects(weights))
            for num_rows in map(int, rows.split(",")):
                x = torch.randn(num_rows, num_inputs).to(kind)
                work = f"{shape}, {num_rows} rows"
                _measure(record, work, subjects, x, size_bytes, rounds)
    record.show()
    print(f"written to {record.write(out)}")


def _subjects(weights: list[Tensor]) -> Iterator[tuple[str, list[Multiply]]]:
    """Ways to multiply, each with one function for every copy of the weights."""
    ops = ReferenceOps()
    dense = [ops.pack_linear(w, None) for w in weights]
    yield "F.linear", [lambda x, p=p: ops.linear(x, p) for p in dense]
    transposed = [w.t().contiguous() for w in weights]
    yield "x @ transposed", [lambda x, w=w: x @ w for w in transposed]
    packed = [linear.pack(w, None) for w in weights]
    layers = [p.payload for p in packed if p is not None]
    yield (
        "oneDNN prepacked",
        [
            lambda x, layer=layer: linear.multiply(x, layer)
            for layer in layers
            if isinstance(layer, linear.OneDnnWeights)
        ],
    )


def _measure(
    record: Record,
    work: str,
    subjects: dict[str, list[Multiply]],
    x: Tensor,
    size_bytes: int,
    rounds: int,
) -> None:
    """Adds one row a subject; the unit is microseconds a product."""
    microseconds: dict[str, list[float]] = {name: [] for name in subjects}
    for current_round in range(rounds + 1):
        for name, functions in subjects.items():
            begin = time.perf_counter()
            for multiply in functions:
                multiply(x)
            # The first round makes oneDNN compile for this number of rows.
            if current_round and functions:
                microseconds[name].append((time.perf_counter() - begin) / len(functions) * 1e6)
    flops = 2 * x.shape[0] * size_bytes / x.element_size()
    for name, values in microseconds.items():
        if not values:
            continue
        best = min(values)
        note = f"best: {size_bytes / best / 1e3:.1f} GB/s, {flops / best / 1e3:.0f} GFLOP/s"
        record.measurements.append(
            Measurement(work=work, subject=name, unit="us", values=tuple(values), note=note)
        )


if __name__ == "__main__":
    typer.run(main)
