"""Attention of many requests' decoders at once, over pages, and of many sources in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quire.core.interface.attention import LayerCache
from quire.core.models.seq2seq.cross_pages import CrossPlan
from quire.core.models.transformers_adapter.pages import (
    PagesPlan,
    RequestSlice,
    read_slots,
    write_slots,
)

_MAX_SLOTS = 1 << 14
"""Slots that are read together: decoding requests of more are attended in several parts."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowGroup:
    """R requests with Q new tokens each; rows are of the flat batch, slots of the pages."""

    rows: Tensor
    """int64 [R, Q]."""
    distance: Tensor
    """int64 [R, Q, L]: how far back a key lies; below 0 it is not to be seen."""
    own_slots: Tensor
    """int64 [R, L]; past a request's length, its first slot."""
    cross_slots: Tensor
    """int64 [R, S]."""
    cross_mask: Tensor
    """bool [R, 1, 1, S]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderStep:
    """One forward of the decoder over the T tokens of a step."""

    positions: Tensor
    """int64 [T]."""
    own: LayerCache
    cross: LayerCache
    slot_mapping: Tensor
    """int64 [T]."""
    new_cross_slots: Tensor
    """int64 [S]: of the sources that are encoded in this step, one after the other."""
    groups: tuple[RowGroup, ...]
    max_len: int
    biases: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)
    """By a table's id: the table, and its biases [R, heads, Q, L] of each group."""

    def attend_own(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, table: Tensor | None
    ) -> Tensor:
        """Writes and attends; q, k, v [T, heads, size] to [T, heads, size of v].

        `table`: a bias [1, heads, 1, max_len] by how far back a key lies.
        """
        keys, values = self.own.tensors[f"k{layer}"], self.own.tensors[f"v{layer}"]
        write_slots(keys, self.slot_mapping, k)
        write_slots(values, self.slot_mapping, v)
        masks = self._masks(table, q.dtype)
        out = q.new_empty((*q.shape[:2], v.shape[-1]))
        for group, mask in zip(self.groups, masks, strict=True):
            found = _attend(q, group.rows, keys, values, group.own_slots, mask, scale)
            out[group.rows] = found
        return out

    def attend_cross(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q [T, heads, size] to the values [T, heads, size] of the requests' sources."""
        keys, values = self.cross.tensors[f"k{layer}"], self.cross.tensors[f"v{layer}"]
        out = q.new_empty((*q.shape[:2], values.shape[-1]))
        for group in self.groups:
            out[group.rows] = _attend(
                q, group.rows, keys, values, group.cross_slots, group.cross_mask, scale
            )
        return out

    def write_cross(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps what a layer made of the new sources, [S, heads, size]."""
        write_slots(self.cross.tensors[f"k{layer}"], self.new_cross_slots, k)
        write_slots(self.cross.tensors[f"v{layer}"], self.new_cross_slots, v)

    def _masks(self, table: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        """Of each group, bool or to be added; one for all layers that share a table."""
        if id(table) not in self.biases:
            masks = [_mask_of(group.distance, table, dtype) for group in self.groups]
            kept = torch.empty(0) if table is None else table
            self.biases[id(table)] = (kept, masks)
        return self.biases[id(table)][1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncoderStep:
    """One forward of the encoder over several sources in one row."""

    positions: Tensor
    """int64 [S]."""
    spans: tuple[tuple[int, int], ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        """q, k, v [1, heads, S, size] to [S, heads, size]; `bias` [1, heads, n, n] of the longest.

        Every source attends to itself alone, and no padding is computed.
        """
        rows = []
        for a, b in self.spans:
            mask = None if bias is None else bias[:, :, : b - a, : b - a]
            rows.append(
                scaled_dot_product_attention(
                    q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], attn_mask=mask, scale=scale
                )
            )
        return torch.cat(rows, 2)[0].transpose(0, 1)


def plan_groups(plan: PagesPlan, cross: CrossPlan) -> tuple[RowGroup, ...]:
    """Decoding requests together, those of like length beside each other; others one by one."""
    requests = [request for request in plan.requests if request.num_new]
    decoding = sorted((r for r in requests if r.num_new == 1), key=lambda r: r.num_past)
    made = [_group([r], plan, cross) for r in requests if r.num_new > 1]
    part: list[RequestSlice] = []
    longest = 0
    for request in decoding:
        length = max(longest, request.num_past + 1, cross.lengths[request.row])
        if part and length * (len(part) + 1) > _MAX_SLOTS:
            made.append(_group(part, plan, cross))
            part, length = [], max(request.num_past + 1, cross.lengths[request.row])
        part.append(request)
        longest = length
    if part:
        made.append(_group(part, plan, cross))
    return tuple(made)


def _group(requests: Sequence[RequestSlice], plan: PagesPlan, cross: CrossPlan) -> RowGroup:
    device = plan.slot_mapping.device
    starts = torch.tensor([[r.begin, r.num_past, r.row] for r in requests], device=device)
    new = torch.arange(requests[0].num_new, device=device)
    lengths = starts[:, 1] + len(new)
    own_slots, positions = _slots(plan.block_table, starts[:, 2], lengths, plan.block_size)
    sources = torch.tensor([max(1, cross.lengths[r.row]) for r in requests], device=device)
    cross_slots, of_source = _slots(cross.block_table, starts[:, 2], sources, cross.block_size)
    seen = starts[:, 1, None] + new
    return RowGroup(
        rows=starts[:, 0, None] + new,
        distance=seen[:, :, None] - positions,
        own_slots=own_slots,
        cross_slots=cross_slots,
        cross_mask=(of_source < sources[:, None])[:, None, None],
    )


def _slots(
    block_table: Tensor, rows: Tensor, lengths: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Slots [R, L] of each request's tokens, and the positions [L]."""
    positions = torch.arange(int(lengths.max()), device=rows.device)
    # What lies past a request's end was never written, or by others: NaN would spoil the sums.
    inside = torch.where(positions < lengths[:, None], positions, 0)
    blocks = block_table[rows].long().gather(1, inside // block_size)
    return blocks * block_size + inside % block_size, positions


def _mask_of(distance: Tensor, table: Tensor | None, dtype: torch.dtype) -> Tensor:
    is_seen = (distance >= 0).unsqueeze(1)
    if table is None:
        return is_seen
    bias = table[0, :, 0].to(dtype)[:, distance.clamp(min=0)].transpose(0, 1)
    return bias.masked_fill(~is_seen, float("-inf"))


def _attend(
    q: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """[R, Q, heads, size]."""
    k, v = (
        read_slots(pages, slots.flatten())
        .view(*slots.shape, *pages.shape[2:])
        .transpose(1, 2)
        .to(q.dtype)
        for pages in (keys, values)
    )
    found = scaled_dot_product_attention(q[rows].transpose(1, 2), k, v, attn_mask=mask, scale=scale)
    return found.transpose(1, 2)
