"""What all layers of a group share in one step: who reads which slots, under which mask.

Requests with one new token (decode) go together into batches of padded length; requests with more
go alone. Keys and values are gathered by slot, so only tokens that a query may see are ever read; a
padded entry repeats the request's own last token, which keeps whatever lies in unused slots out of
every sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.interface import AttentionBatch, AttentionPlan, AttentionSpec

_PADDING_TOLERANCE = 1.5
_SMALL_BATCH_TOKENS = 4096
"""Below so many padded tokens one batch is cheaper than several."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryGroup:
    """n requests that attend together: Q new tokens each, S gathered tokens of context."""

    rows: Tensor | slice
    """Of q and out: int64 [n] where Q is 1, or a slice (of n, or of Q for one request)."""
    num_requests: int
    num_queries: int
    gather: Tensor
    """int64 [n * Hk * S]: rows of the cache seen as [slots * Hk, D], by request, head, token."""
    bias: Tensor | None
    """float32 [n, 1, 1, Q, S]: 0 where a query sees a token, -inf elsewhere.
    None: it sees all, or `is_causal`."""
    is_causal: bool
    """Q equals S and query i sees the first i + 1 tokens: the mask need not be written down."""
    distance: Tensor | None
    """float32 [n, 1, 1, Q, S]: how far back a token lies, where the spec has ALiBi."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReferencePlan(AttentionPlan):
    """The slots that a step writes, and the groups that it attends in."""

    slot_mapping: Tensor
    """int64 [T]."""
    num_tokens: int
    """Rows that belong to a request; those after them are padding."""
    groups: tuple[QueryGroup, ...]


def make_plan(spec: AttentionSpec, batch: AttentionBatch) -> ReferencePlan:
    """The plan for one step. Launches work on the device but waits for none."""
    starts = batch.query_start_loc_host
    num_new = [starts[r + 1] - starts[r] for r in range(batch.num_requests)]
    single = [r for r, count in enumerate(num_new) if count == 1]
    groups = [
        _decode_group(spec, batch, members) for members in _split_by_length(spec, batch, single)
    ]
    groups += [_prefill_group(spec, batch, r) for r, count in enumerate(num_new) if count > 1]
    return ReferencePlan(
        slot_mapping=batch.slot_mapping, num_tokens=starts[batch.num_requests], groups=tuple(groups)
    )


def first_visible(spec: AttentionSpec, position: int) -> int:
    """The first position that the query at `position` sees."""
    if spec.window is not None and spec.kind == "sliding_window":
        return max(0, position - spec.window + 1)
    if spec.window is not None and spec.kind == "chunked":
        return position - position % spec.window
    return 0


def _split_by_length(
    spec: AttentionSpec, batch: AttentionBatch, requests: list[int]
) -> Iterator[list[int]]:
    """Batches of similar length, so that one long context does not pad all others to it."""
    lengths = {r: _context(spec, batch.seq_lens_host[r]) for r in requests}
    if not requests:
        return
    padded = len(requests) * max(lengths.values())
    if padded <= max(_SMALL_BATCH_TOKENS, _PADDING_TOLERANCE * sum(lengths.values())):
        yield requests
        return
    for bits in sorted({length.bit_length() for length in lengths.values()}):
        yield [r for r in requests if lengths[r].bit_length() == bits]


def _context(spec: AttentionSpec, seq_len: int) -> int:
    """How many tokens the last of `seq_len` tokens sees."""
    return seq_len - first_visible(spec, seq_len - 1)


def _decode_group(spec: AttentionSpec, batch: AttentionBatch, requests: list[int]) -> QueryGroup:
    device = batch.seq_lens.device
    starts = [first_visible(spec, batch.seq_lens_host[r] - 1) for r in requests]
    lengths = [batch.seq_lens_host[r] - start for r, start in zip(requests, starts, strict=True)]
    rows = [batch.query_start_loc_host[r] for r in requests]
    # One copy to the device for all that the host knows.
    facts = torch.tensor([requests, starts, lengths, rows], dtype=torch.int64).to(device)
    offsets = torch.arange(max(lengths), device=device)
    last = facts[2].unsqueeze(-1) - 1
    positions = facts[1].unsqueeze(-1) + torch.minimum(offsets, last)  # [n, S]
    distance = (last - offsets).clamp_min_(0)
    is_ragged = min(lengths) < max(lengths)
    return QueryGroup(
        rows=_as_slice(rows) or facts[3],
        num_requests=len(requests),
        num_queries=1,
        gather=_gather_index(spec, batch.block_table.index_select(0, facts[0]), positions),
        bias=_bias(offsets <= last)[:, None, None, None] if is_ragged else None,
        is_causal=False,
        distance=distance[:, None, None, None].float() if spec.has_alibi else None,
    )


def _prefill_group(spec: AttentionSpec, batch: AttentionBatch, request: int) -> QueryGroup:
    device = batch.seq_lens.device
    seq_len = batch.seq_lens_host[request]
    begin, end = batch.query_start_loc_host[request], batch.query_start_loc_host[request + 1]
    first_query = seq_len - (end - begin)
    start = first_visible(spec, first_query)
    keys = torch.arange(start, seq_len, device=device)
    queries = torch.arange(first_query, seq_len, device=device).unsqueeze(-1)
    # The last query sees every gathered token, and the gathered ones begin with the queries.
    is_causal = start == first_query and first_visible(spec, seq_len - 1) == start
    return QueryGroup(
        rows=slice(begin, end),
        num_requests=1,
        num_queries=end - begin,
        gather=_gather_index(spec, batch.block_table[request : request + 1], keys.unsqueeze(0)),
        bias=None if is_causal else _bias(_sees(spec, queries, keys))[None, None, None],
        is_causal=is_causal,
        distance=(queries - keys)[None, None, None].float() if spec.has_alibi else None,
    )


def _as_slice(rows: list[int]) -> slice | None:
    """Rows that follow each other as a slice, which costs no gather."""
    is_run = rows[-1] - rows[0] == len(rows) - 1
    return slice(rows[0], rows[-1] + 1) if is_run else None


def _sees(spec: AttentionSpec, queries: Tensor, keys: Tensor) -> Tensor:
    """Which keys each query sees, by position: bool [Q, S]."""
    sees = keys <= queries
    if spec.window is not None and spec.kind == "sliding_window":
        sees &= keys > queries - spec.window
    elif spec.window is not None and spec.kind == "chunked":
        sees &= keys >= queries - queries % spec.window
    return sees


def _bias(sees: Tensor) -> Tensor:
    return torch.zeros(sees.shape, device=sees.device).masked_fill_(~sees, float("-inf"))


def _gather_index(spec: AttentionSpec, block_table: Tensor, positions: Tensor) -> Tensor:
    """Cache rows of tokens `positions` [n, S] by `block_table` [n, blocks]: [n * Hk * S]."""
    blocks = block_table.gather(1, positions // spec.block_size)
    slots = blocks.long() * spec.block_size + positions % spec.block_size
    heads = torch.arange(spec.num_kv_heads, device=slots.device).unsqueeze(-1)
    return (slots.unsqueeze(1) * spec.num_kv_heads + heads).flatten()
