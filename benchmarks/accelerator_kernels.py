"""An accelerator's kernels as fractions of what its memory and matrix units can do.

The ceilings are measured first, on the same device in the same run: a copy and a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from quire.benchmarks.recording import Measurement
from quire.core.interface import Device, SamplingTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large the work is: a device's, or a dry run's."""

    copy_bytes: int
    matrix: int
    tokens: int
    hidden: int
    prefill: int
    decode_requests: int
    decode_context: int
    heads: tuple[int, int, int]
    """Query heads, key heads, head size."""
    vocab: int
    rounds: int


FULL = Sizes(
    copy_bytes=2 << 30,
    matrix=8192,
    tokens=8192,
    hidden=4096,
    prefill=8192,
    decode_requests=64,
    decode_context=4096,
    heads=(32, 8, 128),
    vocab=128256,
    rounds=20,
)
DRY = Sizes(
    copy_bytes=1 << 16,
    matrix=64,
    tokens=4,
    hidden=64,
    prefill=20,
    decode_requests=2,
    decode_context=20,
    heads=(2, 1, 32),
    vocab=100,
    rounds=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """What the device was seen to do."""

    bytes_per_s: float
    flops: float


def seconds_of(device: Device, work: Callable[[], Any], rounds: int) -> tuple[float, ...]:
    """Wall seconds of each of `rounds` calls, the device awaited, after two that do not count."""
    work()
    work()
    taken = []
    for _ in range(rounds):
        device.synchronize()
        begin = time.perf_counter()
        work()
        device.synchronize()
        taken.append(time.perf_counter() - begin)
    return tuple(taken)


def measure_ceiling(device: Device, sizes: Sizes) -> tuple[Ceiling, list[Measurement]]:
    """The copy bandwidth (read plus written) and the rate of a bfloat16 matrix product."""
    where = device.torch_device
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    copies = seconds_of(device, lambda: target.copy_(source), sizes.rounds)
    n = sizes.matrix
    a, b = (torch.randn(n, n, device=where, dtype=torch.bfloat16) for _ in range(2))
    products = seconds_of(device, lambda: a @ b, sizes.rounds)
    rates = tuple(2 * sizes.copy_bytes / s for s in copies)
    flops = tuple(2 * n**3 / s for s in products)
    ceiling = Ceiling(bytes_per_s=median(rates), flops=median(flops))
    return ceiling, [
        Measurement(work="copy", subject="torch", unit="GB/s", values=_scaled(rates, 1e9)),
        Measurement(
            work="matrix product", subject="torch", unit="TFLOP/s", values=_scaled(flops, 1e12)
        ),
    ]


def measure_kernels(device: Device, sizes: Sizes, ceiling: Ceiling) -> list[Measurement]:
    """Each kernel's fraction of its roofline; of attention: `accelerator_attention`."""
    return [
        *_measure_layers(device, sizes, ceiling),
        _measure_sampling(device, sizes, ceiling),
    ]


def _scaled(values: tuple[float, ...], unit: float) -> tuple[float, ...]:
    return tuple(value / unit for value in values)


def by_bytes(
    work: str, subject: str, seconds: tuple[float, ...], num_bytes: int, ceiling: Ceiling
) -> Measurement:
    """A measurement of work that moves `num_bytes`, as a fraction of the copy bandwidth."""
    values = tuple(num_bytes / s / ceiling.bytes_per_s for s in seconds)
    return Measurement(work=work, subject=subject, unit="of copy bandwidth", values=values)


def by_flops(
    work: str, subject: str, seconds: tuple[float, ...], flops: float, ceiling: Ceiling
) -> Measurement:
    """A measurement of matrix products, as a fraction of the matrix rate."""
    values = tuple(flops / s / ceiling.flops for s in seconds)
    return Measurement(work=work, subject=subject, unit="of matrix rate", values=values)


def _measure_layers(device: Device, sizes: Sizes, ceiling: Ceiling) -> list[Measurement]:
    ops, where = device.ops(), device.torch_device
    shape = (sizes.tokens, sizes.hidden)
    x = torch.randn(shape, device=where, dtype=torch.bfloat16)
    residual, weight = torch.randn_like(x), torch.ones_like(x[0])
    gates = torch.randn(sizes.tokens, 2 * sizes.hidden, device=where, dtype=torch.bfloat16)
    works = {
        "rms_norm": (lambda: ops.rms_norm(x, weight, 1e-6), 2),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, residual, weight, 1e-6), 4),
        "gated_activation": (lambda: ops.gated_activation(gates, "silu"), 3),
    }
    size = 2 * sizes.tokens * sizes.hidden
    return [
        by_bytes(
            name, ops.provider(name), seconds_of(device, work, sizes.rounds), passes * size, ceiling
        )
        for name, (work, passes) in works.items()
    ]


def _measure_sampling(device: Device, sizes: Sizes, ceiling: Ceiling) -> Measurement:
    where, rows = device.torch_device, sizes.decode_requests
    logits = torch.randn(rows, sizes.vocab, device=where)
    settings = SamplingTensors(
        temperature=torch.ones(rows, device=where),
        top_k=torch.full((rows,), 50, device=where),
        top_p=torch.full((rows,), 0.9, device=where),
        min_p=torch.zeros(rows, device=where),
        uniform=torch.rand(rows, device=where),
        is_all_greedy=False,
        needs_filter=True,
    )
    seconds = seconds_of(device, lambda: device.ops().sample(logits, settings), sizes.rounds)
    return by_bytes("sample, top-k and top-p", "quire", seconds, 4 * rows * sizes.vocab, ceiling)
