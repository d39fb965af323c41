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
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from quire.benchmarks.recording import Measurement
from quire.core.interface import AttentionBatch, AttentionSpec, Device, SamplingTensors


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
    """Each kernel's fraction of its roofline, and torch's attention beside ours."""
    return [
        *_measure_layers(device, sizes, ceiling),
        *_measure_decode(device, sizes, ceiling),
        *_measure_prefill(device, sizes, ceiling),
        _measure_sampling(device, sizes, ceiling),
    ]


def _scaled(values: tuple[float, ...], unit: float) -> tuple[float, ...]:
    return tuple(value / unit for value in values)


def _by_bytes(
    work: str, subject: str, seconds: tuple[float, ...], num_bytes: int, ceiling: Ceiling
) -> Measurement:
    values = tuple(num_bytes / s / ceiling.bytes_per_s for s in seconds)
    return Measurement(work=work, subject=subject, unit="of copy bandwidth", values=values)


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
        _by_bytes(
            name, ops.provider(name), seconds_of(device, work, sizes.rounds), passes * size, ceiling
        )
        for name, (work, passes) in works.items()
    ]


def _spec(sizes: Sizes) -> AttentionSpec:
    num_heads, num_kv_heads, size = sizes.heads
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        v_head_size=size,
        scale=size**-0.5,
        dtype="bfloat16",
        cache_dtype="bfloat16",
        block_size=16,
    )


def _attention(device: Device, sizes: Sizes, counts: list[int], length: int) -> Callable[[], Any]:
    """Our attention for requests of `length` tokens, of which `counts` are new."""
    spec, where = _spec(sizes), device.torch_device
    attention = device.attention(spec)
    width = -(-length // 16)
    cache = attention.allocate(len(counts) * width)
    for tensor in cache.tensors.values():
        tensor.zero_()
    starts = [sum(counts[:r]) for r in range(len(counts) + 1)]
    slots = [r * width * 16 + t for r, n in enumerate(counts) for t in range(length - n, length)]
    table = torch.arange(len(counts) * width, dtype=torch.int32).view(len(counts), width)
    batch = AttentionBatch(
        query_start_loc=torch.tensor(starts, dtype=torch.int32, device=where),
        seq_lens=torch.full((len(counts),), length, dtype=torch.int32, device=where),
        block_table=table.to(where),
        slot_mapping=torch.tensor(slots, device=where),
        query_start_loc_host=starts,
        seq_lens_host=[length] * len(counts),
        num_requests=len(counts),
        num_tokens=starts[-1],
        max_query_len=max(counts),
        max_seq_len=length,
    )
    num_heads, num_kv_heads, size = sizes.heads
    q = torch.randn(starts[-1], num_heads, size, device=where, dtype=torch.bfloat16)
    k, v = (q[:, :num_kv_heads].contiguous() for _ in range(2))
    out = torch.empty_like(q)
    plan = attention.plan(batch)
    return lambda: attention.forward(q, k, v, cache, plan, out)


def _dense(
    device: Device, sizes: Sizes, requests: int, queries: int, keys: int
) -> Callable[[], Any]:
    """torch's fused attention on keys that lie in one piece, of which it need look nothing up."""
    num_heads, num_kv_heads, size = sizes.heads
    where = device.torch_device

    def draw(heads: int, length: int) -> torch.Tensor:
        return torch.randn(requests, heads, length, size, device=where, dtype=torch.bfloat16)

    q, k, v = draw(num_heads, queries), draw(num_kv_heads, keys), draw(num_kv_heads, keys)
    is_causal = queries > 1
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def _measure_decode(device: Device, sizes: Sizes, ceiling: Ceiling) -> list[Measurement]:
    requests, context = sizes.decode_requests, sizes.decode_context
    num_bytes = requests * context * 2 * sizes.heads[1] * sizes.heads[2] * 2
    name = f"decode attention, {requests} of {context}"
    ours = _attention(device, sizes, [1] * requests, context)
    theirs = _dense(device, sizes, requests, 1, context)
    return [
        _by_bytes(name, "quire", seconds_of(device, ours, sizes.rounds), num_bytes, ceiling),
        _by_bytes(name, "torch sdpa", seconds_of(device, theirs, sizes.rounds), num_bytes, ceiling),
    ]


def _measure_prefill(device: Device, sizes: Sizes, ceiling: Ceiling) -> list[Measurement]:
    length = sizes.prefill
    flops = 2 * length * length * sizes.heads[0] * sizes.heads[2]  # the half under the diagonal
    subjects = {
        "quire": _attention(device, sizes, [length], length),
        "torch sdpa": _dense(device, sizes, 1, length, length),
    }
    return [
        Measurement(
            work=f"prefill attention of {length}",
            subject=subject,
            unit="of matrix rate",
            values=tuple(flops / s / ceiling.flops for s in seconds_of(device, work, sizes.rounds)),
        )
        for subject, work in subjects.items()
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
    return _by_bytes("sample, top-k and top-p", "quire", seconds, 4 * rows * sizes.vocab, ceiling)
