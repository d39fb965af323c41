"""What the CPU engine reaches of what this machine can do: one table of floors, shares and targets.

    python benchmarks/cpu_targets.py                              # everything, some minutes
    python benchmarks/cpu_targets.py --only decode --classes int8 # one part, one class

Decoding is held against the bandwidth at which all threads read memory, prompts against the rate of
oneDNN's products in float32 and in int8, each measured right before and after the load that it is
the floor of. A share counts operations of linear layers and attention; what lies between is ours.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

# As the engine's own process has it, before torch loads OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import typer

from quire import kernels_cpu
from quire.benchmarks import workloads
from quire.benchmarks.recording import Measurement, Ratio, Record
from quire.benchmarks.shapes import SHAPES, make_model
from quire.benchmarks.workloads import Work

if TYPE_CHECKING:
    from quire import LLM

_READ_MIB = 512
_GEMM_ROWS = 512
_DECODED = 48
_CLASSES = ("bfloat16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Part:
    """One row of the table, for some classes."""

    name: str
    targets: dict[str, float]
    """By class: the share of the floor that is to be reached."""
    measure: Callable[[Bench, int], tuple[float, float]]
    """(bench, round) to the rate, and the floor's rate in the same unit."""
    unit: str


class Bench:
    """A model in one class, and the floors of the machine."""

    def __init__(self, shape: str, home: Path, precision: str) -> None:
        from quire import LLM

        self.shape, self.precision = SHAPES[shape], precision
        self.llm: LLM = LLM(
            model=str(make_model(shape, home, dtype="bfloat16")),
            dtype="bfloat16",
            quantization=None if precision == "bfloat16" else precision,
            max_model_len=4096,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            cache_memory_bytes=1 << 30,
        )
        self.read_bytes = _read_bytes(self.shape, precision)
        self.run([Work(list(range(20, 40)), 4)])

    def run(self, works: list[Work]) -> float:
        """Seconds that a load takes."""
        from quire import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0, max_tokens=w.num_tokens, ignore_eos=True, detokenize=False
            )
            for w in works
        ]
        prompts: list[Any] = [{"prompt_token_ids": work.prompt} for work in works]
        begin = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    def operations(self, works: list[Work]) -> float:
        """Multiplications and additions of a load: layers for all tokens, the head for sampled."""
        s = self.shape
        hidden, layers = s["hidden_size"], s["num_hidden_layers"]
        total = 0.0
        for work in works:
            count = len(work.prompt) + work.num_tokens - 1
            attended = count * (count + 1) / 2
            total += 2 * count * _layer_weights(s) * layers
            total += 4 * attended * hidden * layers
            total += 2 * work.num_tokens * hidden * s["vocab_size"]
        return total


def main(
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "qwen2-0.5b",
    only: Annotated[str, typer.Option(help="parts whose name contains this")] = "",
    classes: Annotated[str, typer.Option(help="separated by commas")] = ",".join(_CLASSES),
    rounds: Annotated[int, typer.Option(help="of each part")] = 3,
    threads: Annotated[int, typer.Option(help="0: torch's own choice")] = 0,
    folder: Annotated[Path | None, typer.Option(help="where the model is kept")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints each rate as a share of its floor, beside the target."""
    if threads:
        torch.set_num_threads(threads)
    home = folder or Path(tempfile.gettempdir()) / "quire-benchmarks"
    settings = {"shape": shape, "rounds": rounds, "threads": torch.get_num_threads()}
    record = Record(name=f"cpu_targets_{shape}", settings=settings)
    for precision in classes.split(","):
        parts = [p for p in PARTS if only in p.name and precision in p.targets]
        if not parts:
            continue
        bench = Bench(shape, home, precision)
        for part in parts:
            _measure(record, bench, part, precision, rounds)
        bench.llm.close()
        del bench
    record.show()
    print(f"written to {record.write(out)}")


def _measure(record: Record, bench: Bench, part: Part, precision: str, rounds: int) -> None:
    """One row: the rates, the floors, the share run by run, and whether the target is met."""
    pairs = [part.measure(bench, number) for number in range(rounds)]
    work = f"{part.name}, {precision}"
    rates, floors = (tuple(column) for column in zip(*pairs, strict=True))
    shares = tuple(rate / floor for rate, floor in pairs)
    target = part.targets[precision]
    verdict = "reached" if median(shares) >= target else "missed"
    note = f"{median(shares):.0%} of the floor, {target:.0%} wanted: {verdict}"
    for subject, values, text in (("quire", rates, note), ("floor", floors, "")):
        record.measurements.append(
            Measurement(work=work, subject=subject, unit=part.unit, values=values, note=text)
        )
    record.ratios.append(Ratio(work=work, better="quire", worse="floor", values=shares))
    record.facts[work] = note
    print(f"{work}: {note}", flush=True)


# --- loads ----------------------------------------------------------------------------------------


def _decode(bench: Bench, number: int) -> tuple[float, float]:
    """Tokens a second of one stream, and how often a second its weights can be read."""
    prompt = workloads.single_stream(np.random.default_rng(number), bench.shape["vocab_size"])[
        0
    ].prompt
    before = read_bandwidth()
    both = bench.run([Work(prompt, 1 + _DECODED)])
    # Another first token: whole blocks of a prompt that only ends otherwise would be in the cache,
    # and what is subtracted would be less than what the prompt took.
    first = bench.run([Work([prompt[0] ^ 1, *prompt[1:]], 1)])
    after = read_bandwidth()
    return _DECODED / (both - first), (before + after) / 2 / bench.read_bytes


def _prefill(bench: Bench, number: int) -> tuple[float, float]:
    """Operations a second of one long prompt."""
    return _against_gemm(bench, number, workloads.long_prefill)


def _mixed(bench: Bench, number: int) -> tuple[float, float]:
    """Operations a second of 32 requests of all lengths."""
    return _against_gemm(bench, number, workloads.mixed)


def _against_gemm(
    bench: Bench,
    number: int,
    make: Callable[[np.random.Generator, int], list[Work]],
) -> tuple[float, float]:
    works = make(np.random.default_rng(1000 + number), bench.shape["vocab_size"])
    before = gemm_rate(bench.shape, bench.precision)
    seconds = bench.run(works)
    after = gemm_rate(bench.shape, bench.precision)
    return bench.operations(works) / seconds / 1e9, (before + after) / 2e9


def _shared_prefix(bench: Bench, number: int) -> tuple[float, float]:
    """1 / seconds with a shared prefix, and of the unshared tokens alone.

    The prefix is in the cache, as a system prompt is after its first request.
    """
    works = workloads.shared_prefix(np.random.default_rng(2000 + number), bench.shape["vocab_size"])
    bench.run([Work(works[0].prompt[:512], 1)])
    alone = [Work(work.prompt[512:], work.num_tokens) for work in works]
    with_prefix = bench.run(works)
    # Other tokens: those of the first run are in the cache.
    others = [Work([token + 1 for token in work.prompt], work.num_tokens) for work in alone]
    return 1 / with_prefix, 1 / bench.run(others)


PARTS = (
    Part("decode, one stream", dict.fromkeys(_CLASSES, 0.8), _decode, "tokens/s"),
    Part("prefill of 2048", {"bfloat16": 0.75, "int8": 0.65}, _prefill, "GOP/s"),
    Part("mixed load of 32", {"int8": 0.5}, _mixed, "GOP/s"),
    Part(
        "shared prefix of 512, 32 requests",
        {"bfloat16": 1 / 1.3, "int8": 1 / 1.3},
        _shared_prefix,
        "runs/s",
    ),
)


# --- floors ---------------------------------------------------------------------------------------


def read_bandwidth() -> float:
    """Bytes a second that all threads read together, at best of three."""
    memory = torch.ones(_READ_MIB << 17, dtype=torch.int64)
    return max(_rate(memory.nbytes, lambda: kernels_cpu.read_memory(memory)) for _ in range(4))


def gemm_rate(shape: dict[str, Any], precision: str) -> float:
    """Operations a second of oneDNN on the largest layer: in int8 for codes, else in float32."""
    num_outputs, num_inputs = 2 * shape["intermediate_size"], shape["hidden_size"]
    operations = 2 * _GEMM_ROWS * num_outputs * num_inputs
    weight = torch.randn(num_outputs, num_inputs)
    multiply = _wide(weight) if precision == "bfloat16" else _coded(weight)
    multiply()  # oneDNN compiles
    return max(_rate(operations, multiply) for _ in range(5))


def _wide(weight: torch.Tensor) -> Callable[[], object]:
    x = torch.randn(_GEMM_ROWS, weight.shape[1])
    packed = torch.ops.mkldnn._reorder_linear_weight.default(weight, None)  # noqa: SLF001
    multiply = torch.ops.mkldnn._linear_pointwise.default  # noqa: SLF001
    return lambda: multiply(x, packed, None, "none", [], "")


def _coded(weight: torch.Tensor) -> Callable[[], object]:
    """One scale for all activations: what the unit can do, not what a model asks."""
    x = torch.randint(0, 256, (_GEMM_ROWS, weight.shape[1]), dtype=torch.uint8)
    codes = (weight * 30).round().clamp(-127, 127).to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    scales = torch.ones(weight.shape[0])
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    rest: tuple[object, ...] = (
        0.1,
        0,
        packed,
        scales,
        zeros,
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return lambda: torch.ops.onednn.qlinear_pointwise(x, *rest)


def _rate(amount: float, function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return float(amount / (time.perf_counter() - begin))


def _layer_weights(shape: dict[str, Any]) -> int:
    """Weights of the linear layers of one layer."""
    return sum(_linears(shape))


def _linears(shape: dict[str, Any]) -> Iterator[int]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape.get("head_dim", hidden // heads)
    yield (heads + 2 * kv_heads) * size * hidden
    yield hidden * heads * size
    yield 3 * hidden * inner


def _read_bytes(shape: dict[str, Any], precision: str) -> float:
    """Bytes of weights that a token reads: codes and their scales, or bfloat16."""
    # int4 has a scale of two bytes and a zero for every 64 weights, and an int8 head.
    of_layers = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 3 / 64}[precision]
    of_head = 2.0 if precision == "bfloat16" else 1.0
    weights = _layer_weights(shape) * int(shape["num_hidden_layers"])
    of_vocabulary = float(shape["hidden_size"] * shape["vocab_size"])
    return weights * of_layers + of_vocabulary * of_head


if __name__ == "__main__":
    typer.run(main)
