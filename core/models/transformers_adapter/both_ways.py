"""Attention for spans whose tokens see each other, on top of a causal or windowed cache.

The device's attention has written keys and values and answered for all rows as if they saw what
came before. The rows of a span are answered again here, from the same keys and values: those of
this step as they came, earlier ones read back from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quire.core.interface.attention import AttentionBackend, AttentionSpec, LayerCache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """Tokens [first, end) of a request, as far as a step computes them."""

    begin: int
    """The request's first row in the step."""
    num_computed: int
    first: int
    end: int
    block_ids: Sequence[Sequence[int]]
    """For each cache group."""
    is_cut_by_windows: bool = False
    """Whether a window hides tokens of the span too, or only what came before it."""


def attend_both_ways(
    span: Span,
    spec: AttentionSpec,
    backend: AttentionBackend,
    cache: LayerCache,
    group: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
) -> None:
    """Rewrites the rows of `span` in `out` [T, Hq, Dv]; q, k, v are the step's [T, heads, D]."""
    first_query = max(span.first, span.num_computed)
    window = spec.window if spec.kind == "sliding_window" else None
    low = 0
    if window is not None:
        in_window = max(0, first_query - window + 1)
        low = in_window if span.is_cut_by_windows else min(span.first, in_window)
    shift = span.begin - span.num_computed
    keys, values = _keys_and_values(span, spec, backend, cache, group, k, v, low)
    queries = torch.arange(first_query, span.end, device=q.device).unsqueeze(1)
    places = torch.arange(low, span.end, device=q.device)
    is_near = torch.ones_like(places <= queries) if window is None else places > queries - window
    sees_of_span = (places >= span.first) & (places < span.end)
    if span.is_cut_by_windows:
        sees_of_span = sees_of_span & is_near
    sees = ((places <= queries) & is_near) | sees_of_span
    rows = slice(shift + first_query, shift + span.end)
    num_groups = spec.num_heads // spec.num_kv_heads
    scores = torch.einsum(
        "qhd,khd->hqk", q[rows].float(), keys.float().repeat_interleave(num_groups, 1)
    )
    scores = scores * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    mixed = torch.einsum("hqk,khd->qhd", weights, values.float().repeat_interleave(num_groups, 1))
    out[rows] = mixed.to(out.dtype)


def _keys_and_values(
    span: Span,
    spec: AttentionSpec,
    backend: AttentionBackend,
    cache: LayerCache,
    group: int,
    k: Tensor,
    v: Tensor,
    low: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens [low, span.end)."""
    shift = span.begin - span.num_computed
    begin = max(low, span.num_computed)
    keys, values = k[shift + begin : shift + span.end], v[shift + begin : shift + span.end]
    if low >= span.num_computed:
        return keys, values
    size = spec.block_size
    first_block, end_block = low // size, -(-span.num_computed // size)
    ids = [int(block) for block in span.block_ids[group][first_block:end_block]]
    blocks = backend.export_blocks(cache, ids).flatten(0, 1)
    past = blocks[low - first_block * size : span.num_computed - first_block * size]
    past_keys, past_values = past[..., : spec.head_size], past[..., spec.head_size :]
    device, dtype = keys.device, keys.dtype
    return (
        torch.cat([past_keys.to(device, dtype), keys]),
        torch.cat([past_values.to(device, dtype), values]),
    )
