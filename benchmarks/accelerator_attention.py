"""Attention of a device beside torch's, FlexAttention and the libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from quire.backends.torch_accelerator.providers import PROVIDERS, Provider
from quire.benchmarks.accelerator_kernels import Ceiling, Sizes, by_bytes, seconds_of
from quire.benchmarks.recording import Measurement
from quire.core.discovery import load_backend
from quire.core.interface import AttentionBatch, AttentionSpec, Device, WorkerConfig

Work = Callable[[], Any]
_BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSubject:
    """Who attends."""

    name: str
    make: Callable[[list[int], int], Work]
    """The work of requests with so many new tokens each and so long a context."""

    def measure(self, device: Device, sizes: Sizes, ceiling: Ceiling) -> list[Measurement]:
        """Decoding as a fraction of the copy bandwidth and a prompt as one of the matrix rate.

        Raises: whatever a library raises on a device that it does not serve.
        """
        requests, context, length = sizes.decode_requests, sizes.decode_context, sizes.prefill
        num_bytes = requests * context * 2 * sizes.heads[1] * sizes.heads[2] * 2
        flops = 2 * length * length * sizes.heads[0] * sizes.heads[2]  # half: under the diagonal
        name = f"decode attention, {requests} of {context}"
        seconds = seconds_of(device, self.make([1] * requests, context), sizes.rounds)
        decoding = by_bytes(name, self.name, seconds, num_bytes, ceiling)
        seconds = seconds_of(device, self.make([length], length), sizes.rounds)
        rates = tuple(flops / s / ceiling.flops for s in seconds)
        name = f"prefill attention of {length}"
        prompt = Measurement(work=name, subject=self.name, unit="of matrix rate", values=rates)
        return [decoding, prompt]


def attention_subjects(
    backend: str, device: Device, sizes: Sizes, *, is_dry: bool
) -> Iterator[AttentionSubject]:
    """Quire, torch, and the libraries that are installed."""
    for name, make in _subjects(backend, device, sizes, is_dry=is_dry):
        yield AttentionSubject(name=name, make=make)


def _subjects(
    backend: str, device: Device, sizes: Sizes, *, is_dry: bool
) -> Iterator[tuple[str, Callable[[list[int], int], Work]]]:
    yield "quire", partial(paged_work, device, _spec(sizes, _BLOCK_SIZE))
    yield "torch sdpa", partial(_dense, device, sizes)
    yield "torch flex", partial(_flex, device, sizes, is_dry=is_dry)
    for provider in PROVIDERS:
        if backend in provider.backends and provider.is_installed:
            yield provider.name, partial(_library, backend, provider, sizes)


def _library(
    backend: str, provider: Provider, sizes: Sizes, counts: list[int], length: int
) -> Work:
    """The work of a library over our cache, on a device of its own that was told to use it."""
    size = max(provider.load().block_step, _BLOCK_SIZE)
    device = load_backend(backend).open(0)
    config = WorkerConfig(
        model="none",
        dtype="bfloat16",
        cache_dtype="bfloat16",
        block_size=size,
        max_model_len=length,
        max_num_seqs=len(counts),
        max_num_batched_tokens=sum(counts),
        device_memory_fraction=0.5,
        options={f"{backend}.attention": provider.name},
    )
    device.make_worker(config)
    return paged_work(device, _spec(sizes, size), counts, length)


def _spec(sizes: Sizes, block_size: int) -> AttentionSpec:
    num_heads, num_kv_heads, size = sizes.heads
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=size,
        v_head_size=size,
        scale=size**-0.5,
        dtype="bfloat16",
        cache_dtype="bfloat16",
        block_size=block_size,
    )


def paged_work(device: Device, spec: AttentionSpec, counts: list[int], length: int) -> Work:
    """A device's attention for requests of `length` tokens, of which `counts` are new."""
    attention, where, size = device.attention(spec), device.torch_device, spec.block_size
    width = -(-length // size)
    cache = attention.allocate(len(counts) * width)
    for tensor in cache.tensors.values():
        tensor.zero_()
    starts = [sum(counts[:r]) for r in range(len(counts) + 1)]
    slots = [r * width * size + t for r, n in enumerate(counts) for t in range(length - n, length)]
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
    q = torch.randn(starts[-1], spec.num_heads, spec.head_size, device=where, dtype=torch.bfloat16)
    k, v = (q[:, : spec.num_kv_heads].contiguous() for _ in range(2))
    out = q.new_empty(starts[-1], spec.num_heads, spec.v_head_size)
    plan = attention.plan(batch)
    return lambda: attention.forward(q, k, v, cache, plan, out)


def _tensors(device: Device, sizes: Sizes, counts: list[int], keys: int) -> list[torch.Tensor]:
    """q, k, v [requests, heads, tokens, size], in one piece."""
    num_heads, num_kv_heads, size = sizes.heads
    lengths = (max(counts), keys, keys)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [
        torch.randn(len(counts), h, n, size, device=device.torch_device, dtype=torch.bfloat16)
        for h, n in zip(heads, lengths, strict=True)
    ]


def _dense(device: Device, sizes: Sizes, counts: list[int], keys: int) -> Work:
    """torch's fused attention on keys that lie in one piece, of which it need look nothing up."""
    q, k, v = _tensors(device, sizes, counts, keys)
    is_causal = max(counts) > 1
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def _flex(device: Device, sizes: Sizes, counts: list[int], keys: int, *, is_dry: bool) -> Work:
    """FlexAttention, compiled, with a mask of blocks; a dry run interprets it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _tensors(device, sizes, counts, keys)
    shift = keys - max(counts)

    def is_seen(batch: Any, head: Any, query: Any, key: Any) -> Any:  # noqa: ARG001 - its form
        return key <= query + shift

    mask = create_block_mask(is_seen, None, None, max(counts), keys, device=device.torch_device)
    attend: Any = flex_attention if is_dry else torch.compile(flex_attention, dynamic=False)
    return lambda: attend(q, k, v, block_mask=mask, enable_gqa=True)
