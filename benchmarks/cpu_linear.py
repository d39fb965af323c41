"""How fast linear layers are multiplied on this CPU, by shape, rows and class of precision.

    GOMP_SPINCOUNT=1000 python benchmarks/cpu_linear.py --threads 2  # threads wait as in the engine

Subjects take turns within one run, and weights rotate through so many copies that none of them is
still in a cache, as in a model whose layers take turns. Beside each figure stand the floors of the
same run: with few rows the bandwidth at which this machine reads memory, with many the rate of
oneDNN's products in float32 and in int8 (with one scale for all activations, so not of use itself).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu import linear
from quire.backends.cpu.ops import CpuOps
from quire.backends.reference import ReferenceOps
from quire.benchmarks.recording import Measurement, Ratio, Record
from quire.core.interface import Ops, QuantizedWeight

SHAPES = {
    "qkv 1152x896": (1152, 896),
    "output 896x896": (896, 896),
    "gate, up 9728x896": (9728, 896),
    "down 896x4864": (896, 4864),
    "lm head 151936x896": (151936, 896),
}
"""Of a Qwen2 with 0.5 billion parameters: outputs x inputs."""
_FEW_ROWS = 8
"""Up to here the bytes of the weights decide, above it the unit."""
Multiply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Subject:
    """One way to multiply."""

    name: str
    functions: list[Multiply]
    """One for every copy of the weights."""
    dtype: torch.dtype
    """Of the activations."""
    size_bytes: int
    """Of one copy of the weights, scales included."""


def main(
    threads: Annotated[int, typer.Option()] = 1,
    rows: Annotated[str, typer.Option(help="numbers of rows, separated by commas")] = "1,8,32,512",
    only: Annotated[str, typer.Option(help="shapes whose name contains this")] = "",
    rounds: Annotated[int, typer.Option(help="of each subject, interleaved")] = 5,
    cold_mib: Annotated[int, typer.Option(help="weights to rotate through, in float32")] = 128,
    isa: Annotated[str, typer.Option(help="ISA level; empty: the best")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints microseconds, GB/s of weights, GOP/s, and the shares of the floors."""
    torch.set_num_threads(threads)
    if isa:
        kernels_cpu.use_isa(isa)
    level = kernels_cpu.isa()
    settings = {"threads": threads, "rounds": rounds, "cold_mib": cold_mib, "isa": level}
    record = Record(name=f"cpu_linear_{level}", settings=settings)
    memory = torch.ones(64 << 20)
    with torch.inference_mode():
        for shape, (num_outputs, num_inputs) in SHAPES.items():
            if only not in shape:
                continue
            num_copies = max(1, min(24, (cold_mib << 20) // (num_outputs * num_inputs * 4)))
            subjects = list(_subjects(num_outputs, num_inputs, num_copies))
            for num_rows in map(int, rows.split(",")):
                x = torch.randn(num_rows, num_inputs)
                work = f"{shape}, {num_rows} rows"
                _measure(record, work, subjects, x, num_outputs, rounds, memory)
    record.show()
    print(f"written to {record.write(out)}")


def _subjects(num_outputs: int, num_inputs: int, num_copies: int) -> Iterator[Subject]:
    """Every class by the backend's own choice, and oneDNN as torch offers it."""
    weights = [torch.randn(num_outputs, num_inputs) for _ in range(num_copies)]
    cpu, plain = CpuOps(), ReferenceOps()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield _dense(f"quire {name}", cpu, weights, dtype)
        yield _dense(f"F.linear {name}", plain, weights, dtype)
    for bits, group_size in ((8, 0), (4, 64)):
        yield _quantized(bits, group_size, num_outputs, num_inputs, num_copies)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        packed = [linear.pack(weight.to(dtype), None) for weight in weights]
        layers = [p.payload for p in packed if p is not None]
        functions = [
            lambda x, layer=layer: linear.multiply(x, layer)
            for layer in layers
            if isinstance(layer, linear.OneDnnWeights)
        ]
        yield Subject(f"oneDNN {name}", functions, dtype, weights[0].numel() * dtype.itemsize)
    yield _onednn_int8(weights)


def _dense(name: str, ops: Ops, weights: list[Tensor], dtype: torch.dtype) -> Subject:
    packed = [ops.pack_linear(weight.to(dtype), None) for weight in weights]
    functions = [lambda x, p=p: ops.linear(x, p) for p in packed]
    return Subject(name, functions, dtype, weights[0].numel() * dtype.itemsize)


def _quantized(bits: int, group_size: int, num_outputs: int, num_inputs: int, n: int) -> Subject:
    ops = CpuOps()
    packed = []
    num_groups = num_inputs // group_size if group_size else 1
    for _ in range(n):
        shape = (num_outputs, num_inputs * bits // 8)
        scales = torch.rand(num_outputs, num_groups)
        zeros = torch.full(scales.shape, 7, dtype=torch.uint8) if bits == 4 else None
        weight = QuantizedWeight(
            bits=bits,
            group_size=group_size,
            num_inputs=num_inputs,
            codes=torch.randint(0, 256, shape, dtype=torch.uint8),
            scales=scales.bfloat16() if bits == 4 else scales,
            zeros=zeros,
            activations="group" if group_size else "token",
        )
        packed.append(ops.pack_quantized_linear(weight, None, "bfloat16"))
    functions = [lambda x, p=p: ops.linear(x, p) for p in packed]
    return Subject(f"quire int{bits}", functions, torch.bfloat16, packed[0].size_bytes)


def _onednn_int8(weights: list[Tensor]) -> Subject:
    """Rounded activations with one scale for all rows: what the unit can do, not what is asked."""
    num_outputs = weights[0].shape[0]
    scales, zeros = torch.ones(num_outputs), torch.zeros(num_outputs, dtype=torch.int64)
    functions: list[Multiply] = []
    for weight in weights:
        codes = (weight * 30).round().clamp(-127, 127).to(torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(codes, None)

        def multiply(x: Tensor, packed: Tensor = packed) -> Tensor:
            arguments = (0.1, 0, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            result: Tensor = torch.ops.onednn.qlinear_pointwise(x, *arguments)
            return result

        functions.append(multiply)
    return Subject("oneDNN int8", functions, torch.uint8, weights[0].numel())


def _measure(
    record: Record,
    work: str,
    subjects: list[Subject],
    x: Tensor,
    num_outputs: int,
    rounds: int,
    memory: Tensor,
) -> None:
    """Adds one row a subject, and its share of the floor of the same rounds."""
    seconds: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    bandwidths = []
    rounded = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    for current_round in range(rounds + 1):
        bandwidths.append(_read_bandwidth(memory))
        for subject in subjects:
            given = rounded if subject.dtype == torch.uint8 else x.to(subject.dtype)
            begin = time.perf_counter()
            for multiply in subject.functions:
                multiply(given)
            # The first round makes oneDNN compile for this number of rows.
            if current_round:
                elapsed = time.perf_counter() - begin
                seconds[subject.name].append(elapsed / len(subject.functions))
    operations = 2 * x.numel() * num_outputs
    for subject in subjects:
        values = seconds[subject.name]
        middle = median(values)
        note = (
            f"{subject.size_bytes / middle / 1e9:.1f} GB/s, {operations / middle / 1e9:.0f} GOP/s"
        )
        micro = tuple(value * 1e6 for value in values)
        record.measurements.append(
            Measurement(work=work, subject=subject.name, unit="us", values=micro, note=note)
        )
    record.ratios += _shares(work, subjects, seconds, bandwidths[1:], x.shape[0])


def _shares(
    work: str,
    subjects: list[Subject],
    seconds: dict[str, list[float]],
    bandwidths: list[float],
    num_rows: int,
) -> Iterator[Ratio]:
    """Of the read bandwidth with few rows; of oneDNN's rate in the next wider class with many."""
    for subject in subjects:
        if not subject.name.startswith("quire"):
            continue
        mine = seconds[subject.name]
        if num_rows <= _FEW_ROWS:
            name = "read bandwidth"
            floors = [subject.size_bytes / bandwidth for bandwidth in bandwidths]
        else:
            name = "oneDNN int8" if "int" in subject.name else "oneDNN float32"
            floors = seconds[name]
        shares = tuple(floor / own for floor, own in zip(floors, mine, strict=True))
        yield Ratio(work=work, better=subject.name, worse=name, values=shares)


def _read_bandwidth(memory: Tensor) -> float:
    """Bytes a second that a sum reads, with all threads."""
    begin = time.perf_counter()
    memory.sum()
    return memory.nbytes / (time.perf_counter() - begin)


if __name__ == "__main__":
    typer.run(main)
