"""Convolutions and scans over sequences in plain torch: one step of time after the other.

All sequences take their steps together; those that have ended drop out. States in a page are copied
out of it and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from quire.core.interface import Sequences


def through_page(
    states: Tensor, sequences: Sequences, scan: Callable[[Tensor, Sequences], Tensor]
) -> Tensor:
    """`scan` with states [S, ...] of its own, of `Sequences.slots` if there are such."""
    slots = sequences.slots
    if slots is None:
        return scan(states, sequences)
    own = states.index_select(0, slots.sources.clamp(min=0))
    own[slots.sources < 0] = 0
    out = scan(own, replace(sequences, slots=None))
    states.index_copy_(0, slots.targets, own)
    return out


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    sequences: Sequences,
    *,
    activation: str,
) -> Tensor:
    """`Ops.causal_conv1d`: sequence by sequence."""
    if activation not in ("", "silu"):
        raise ValueError(f"causal_conv1d was asked for {activation!r}; it knows silu and none")
    out = torch.zeros_like(x)
    starts = sequences.starts_host
    for number in range(sequences.num_sequences):
        rows = slice(starts[number], starts[number + 1])
        if rows.start == rows.stop:
            continue
        inputs = torch.cat((states[number], x[rows].T), dim=-1)  # [C, W - 1 + n]
        windows = _wide(inputs).unfold(-1, weight.shape[-1], 1)  # [C, n, W]
        summed = (windows * _wide(weight).unsqueeze(1)).sum(-1).T
        if bias is not None:
            summed = summed + _wide(bias)
        out[rows] = (F.silu(summed) if activation else summed).to(x.dtype)
        states[number] = inputs[:, inputs.shape[-1] - states.shape[-1] :]
    return out


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """`Ops.selective_scan`."""
    wide_x, wide_b, wide_c = _wide(x), _wide(b), _wide(c)
    decay = torch.exp(dt.unsqueeze(-1) * a)  # [T, C, N]
    added = (dt * wide_x).unsqueeze(-1) * wide_b.unsqueeze(1)

    def step(h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        h = decay[rows] * h + added[rows]
        return h, (h * wide_c[rows].unsqueeze(1)).sum(-1)

    out = _scan(step, wide_x, states, sequences)
    return (out if d is None else out + d * wide_x).to(x.dtype)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """`Ops.ssd_scan`."""
    heads = x.shape[1]
    wide_x, wide_b, wide_c = _wide(x), _to_heads(b, heads), _to_heads(c, heads)
    decay = torch.exp(dt * a)  # [T, M]
    weighted = wide_x * dt.unsqueeze(-1)

    def step(h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        added = weighted[rows].unsqueeze(-1) * wide_b[rows].unsqueeze(-2)
        h = decay[rows][..., None, None] * h + added
        return h, (h * wide_c[rows].unsqueeze(-2)).sum(-1)

    out = _scan(step, wide_x, states, sequences)
    return (out if d is None else out + d.unsqueeze(-1) * wide_x).to(x.dtype)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """`Ops.gated_delta_rule`."""
    heads = v.shape[1]
    wide_q, wide_k, wide_v = _to_heads(q, heads), _to_heads(k, heads), _wide(v)
    kept = torch.exp(decay)

    def step(h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        h = kept[rows][..., None, None] * h  # [n, M, D, Dv]
        key = wide_k[rows].unsqueeze(-1)
        recalled = (h * key).sum(-2)
        change = beta[rows].unsqueeze(-1) * (wide_v[rows] - recalled)
        h = h + key * change.unsqueeze(-2)
        return h, (h * wide_q[rows].unsqueeze(-1)).sum(-2)

    return _scan(step, wide_v, states, sequences).to(v.dtype)


def _scan(
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    like: Tensor,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """Runs `step(h, rows)` for each time over the sequences that have one. Overwrites `states`."""
    out = torch.zeros_like(like)
    for rows, alive in _times(sequences, like.device):
        h, result = step(states[alive].to(like.dtype), rows)
        states[alive] = h.to(states.dtype)
        out[rows] = result
    return out


def _times(sequences: Sequences, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """For each time: the rows that are then computed, and the sequences that they belong to."""
    starts = torch.tensor(list(sequences.starts_host[:-1]), dtype=torch.int64)
    lengths = torch.tensor(list(sequences.starts_host[1:]), dtype=torch.int64) - starts
    for time in range(sequences.max_length):
        alive = (lengths > time).nonzero().squeeze(-1)
        yield (starts[alive] + time).to(device), alive.to(device)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """[T, G, N] as [T, M, N]: each group stands for M // G heads."""
    return _wide(x).repeat_interleave(heads // x.shape[1], dim=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
