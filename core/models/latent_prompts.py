"""Prompts over a latent cache, computed with keys and values of every head's own.

Latent attention can be computed in two forms. Absorbed, queries go to the latent and a head reads
2R + P numbers of every token it sees; expanded, keys and values of every head are made of the
latent once for each token, and a head reads `plain + P + value` of them. Decoding is cheaper in the
first form, a prompt in the second. Which one a request takes is decided here, a step at a time; the
cache holds the latent alone in both.

Source: DeepSeek-V2 report, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.core.interface.attention import (
    AttentionBackend,
    AttentionBatch,
    AttentionPlan,
    AttentionSpec,
    CacheLayout,
    LayerCache,
)
from quire.core.interface.backend import Device
from quire.core.interface.errors import Reason, UnsupportedError
from quire.core.models.attention_groups import expanded_spec
from quire.core.models.decoder_spec import LatentSpec

_FEWEST_TOKENS = 16
"""Of a prompt's chunk; below, products with the latent's matrices are too small to pay."""
_LONGEST_CONTEXT = 16384
"""Tokens whose keys and values are held at a time, unless a step may have more."""
_PIECE = 2048
"""Tokens of the cache that are expanded at a time, so that a long prefix needs little memory."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpandedStep:
    """The requests of a step whose keys and values are expanded."""

    rows: Tensor | None
    """Of the step, int64 [n], request after request; None: all."""
    slots: Tensor
    """Where these rows go in the latent's cache: int64 [n]."""
    prefix_slots: Tensor
    """Where tokens of earlier steps lie in the latent's cache: int64 [m]."""
    prefix_targets: Tensor
    """Where their keys and values go in the scratch cache: int64 [m]."""
    plan: AttentionPlan
    """Of the heads' own attention, over the scratch cache."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AbsorbedStep:
    """The requests of the same step that stay with the latent."""

    rows: Tensor
    """int64 [n]."""
    plan: AttentionPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedPlan(AttentionPlan):
    """A step of which some requests at least are expanded."""

    expanded: ExpandedStep
    absorbed: AbsorbedStep | None
    num_tokens: int
    """Rows that belong to a request; those after them are padding."""


class PromptExpansion(AttentionBackend):
    """A device's latent attention, which tells apart whose prompts are worth expanding.

    `plan` gives a `MixedPlan` where there are such, and the device's own plan where there are none,
    as in every step that only decodes. Everything else is the device's latent attention.
    """

    def __init__(
        self,
        latent: AttentionBackend,
        heads: AttentionBackend,
        sizes: LatentSpec,
        *,
        max_tokens: int,
        torch_device: str,
    ) -> None:
        """heads: causal attention of `expanded_spec`. max_tokens: of all contexts of a step."""
        self.spec = latent.spec
        self.heads = heads
        self._latent = latent
        self._sizes = sizes
        self._max_tokens = max_tokens
        self._torch_device = torch_device
        self._scratch: LayerCache | None = None

    def provider(self) -> str:
        """Who serves the latent; heads are served by the same device."""
        return self._latent.provider()

    @property
    def absorbed(self) -> AttentionBackend:
        """The device's latent attention itself."""
        return self._latent

    @classmethod
    def reasons_against(cls, spec: AttentionSpec) -> list[Reason]:  # noqa: ARG003
        """None: the device was asked for both forms."""
        return []

    def cache_layout(self) -> CacheLayout:
        """Of the latent."""
        return self._latent.cache_layout()

    def allocate(self, num_blocks: int) -> LayerCache:
        """Of the latent. Raises: DeviceOutOfMemory."""
        return self._latent.allocate(num_blocks)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        plan: AttentionPlan,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
    ) -> Tensor:
        """Of requests that stay with the latent, by a plan of its own."""
        return self._latent.forward(
            q, k, v, cache, plan, out, sinks=sinks, alibi_slopes=alibi_slopes
        )

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Into the latent's cache."""
        self._latent.write(k, v, cache, slot_mapping)

    def read_keys(self, cache: LayerCache, slots: Tensor) -> Tensor:
        """Of the latent's cache."""
        return self._latent.read_keys(cache, slots)

    def copy_blocks(self, cache: LayerCache, source: Sequence[int], target: Sequence[int]) -> None:
        """Of the latent's cache."""
        self._latent.copy_blocks(cache, source, target)

    def export_blocks(self, cache: LayerCache, block_ids: Sequence[int]) -> Tensor:
        """Of the latent's cache."""
        return self._latent.export_blocks(cache, block_ids)

    def import_blocks(self, cache: LayerCache, block_ids: Sequence[int], blocks: Tensor) -> None:
        """Of the latent's cache."""
        self._latent.import_blocks(cache, block_ids, blocks)

    @property
    def scratch(self) -> LayerCache:
        """Keys and values of `heads`, which every layer writes anew. Allocated with the first use.

        Raises: DeviceOutOfMemory.
        """
        if self._scratch is None:
            # Each request may leave a part of its last block unused.
            blocks = 2 * -(-self._max_tokens // self.spec.block_size)
            self._scratch = self.heads.allocate(blocks)
        return self._scratch

    # --- whose prompts ----------------------------------------------------------------------------

    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        """A `MixedPlan`, or the latent's own."""
        chosen = self._worth_expanding(batch)
        if not chosen:
            return self._latent.plan(batch)
        others = [r for r in range(batch.num_requests) if r not in set(chosen)]
        return MixedPlan(
            expanded=self._expanded(batch, chosen),
            absorbed=self._absorbed(batch, others) if others else None,
            num_tokens=batch.query_start_loc_host[batch.num_requests],
        )

    def _worth_expanding(self, batch: AttentionBatch) -> list[int]:
        """The requests with enough new tokens, as far as there is scratch memory for them."""
        left, chosen = self._max_tokens, []
        starts = batch.query_start_loc_host
        for request in range(batch.num_requests):
            seq_len = batch.seq_lens_host[request]
            count = starts[request + 1] - starts[request]
            if seq_len <= left and is_worth_expanding(self._sizes, count, seq_len - count):
                chosen.append(request)
                left -= seq_len
        return chosen

    def _expanded(self, batch: AttentionBatch, chosen: Sequence[int]) -> ExpandedStep:
        size = self.spec.block_size
        starts, ends = batch.query_start_loc_host, batch.seq_lens_host
        counts = [starts[r + 1] - starts[r] for r in chosen]
        num_blocks = [-(-ends[r] // size) for r in chosen]
        first = [sum(num_blocks[:index]) for index in range(len(chosen))]
        width = max(num_blocks)
        table = [
            [begin + min(block, count - 1) for block in range(width)]
            for begin, count in zip(first, num_blocks, strict=True)
        ]
        new, old = [], []
        for begin, r, count in zip(first, chosen, counts, strict=True):
            target = torch.arange(begin * size, begin * size + ends[r])
            old.append(target[: ends[r] - count])
            new.append(target[ends[r] - count :])
        heads_batch = _sub_batch(batch, chosen, table=torch.tensor(table), slots=torch.cat(new))
        rows = None
        if sum(counts) < batch.num_tokens:
            rows = self._on_device(_rows_of(batch, chosen))
        slots = batch.slot_mapping
        return ExpandedStep(
            rows=rows,
            slots=slots if rows is None else slots.index_select(0, rows),
            prefix_slots=self._slots_before(batch, chosen),
            prefix_targets=self._on_device(torch.cat(old)),
            plan=self.heads.plan(heads_batch),
        )

    def _absorbed(self, batch: AttentionBatch, others: Sequence[int]) -> AbsorbedStep:
        rows = self._on_device(_rows_of(batch, others))
        index = self._on_device(torch.tensor(others))
        sub_batch = _sub_batch(
            batch,
            others,
            table=batch.block_table.index_select(0, index),
            slots=batch.slot_mapping.index_select(0, rows),
        )
        return AbsorbedStep(rows=rows, plan=self._latent.plan(sub_batch))

    def _slots_before(self, batch: AttentionBatch, chosen: Sequence[int]) -> Tensor:
        """Slots of the tokens of earlier steps, request after request: int64 [m]."""
        size, starts = self.spec.block_size, batch.query_start_loc_host
        parts = []
        for r in chosen:
            count = batch.seq_lens_host[r] - (starts[r + 1] - starts[r])
            if count:
                positions = torch.arange(count, device=batch.block_table.device)
                blocks = batch.block_table[r].index_select(0, positions // size)
                parts.append(blocks.long() * size + positions % size)
        return torch.cat(parts) if parts else batch.slot_mapping[:0]

    def _on_device(self, numbers: Tensor) -> Tensor:
        return numbers.to(self._torch_device)


def is_worth_expanding(sizes: LatentSpec, num_new: int, num_before: int) -> bool:
    """Whether a chunk of `num_new` tokens after `num_before` takes less work expanded.

    Making keys and values of the tokens before costs each head R (plain + value) products a token;
    attention saves 2R - plain - value for each pair of tokens that sees each other. What the new
    tokens' own projections cost is the same in both forms.
    """
    if num_new < _FEWEST_TOKENS:
        return False
    made = sizes.plain_size + sizes.value_size
    pairs = num_new * (num_before + (num_new + 1) / 2)
    return num_before * sizes.kv_rank * made < pairs * (2 * sizes.kv_rank - made)


def expand_prompts(
    latent: AttentionBackend,
    sizes: LatentSpec,
    device: Device,
    *,
    max_step_tokens: int,
    max_model_len: int,
) -> AttentionBackend:
    """The same attention with prompts expanded, where the device can; else as it is."""
    claims = device.capabilities
    # Buckets are for compiled steps of few shapes; parts of a step have any.
    if "cache_rows" not in claims.features or claims.token_buckets or claims.request_buckets:
        return latent
    try:
        heads = device.attention(expanded_spec(latent.spec, sizes))
    except UnsupportedError:
        return latent
    return PromptExpansion(
        latent,
        heads,
        sizes,
        max_tokens=max(max_step_tokens, min(max_model_len, _LONGEST_CONTEXT)),
        torch_device=str(device.torch_device),
    )


def pieces_of(slots: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Slots and targets [m] in pieces that little memory is needed for."""
    for begin in range(0, len(slots), _PIECE):
        yield slots[begin : begin + _PIECE], targets[begin : begin + _PIECE]


def _rows_of(batch: AttentionBatch, requests: Sequence[int]) -> Tensor:
    """Their rows in the step, on the host."""
    starts = batch.query_start_loc_host
    return torch.cat([torch.arange(starts[r], starts[r + 1]) for r in requests])


def _sub_batch(
    batch: AttentionBatch, requests: Sequence[int], *, table: Tensor, slots: Tensor
) -> AttentionBatch:
    """The step of some of its requests, with rows of their own."""
    starts = batch.query_start_loc_host
    counts = [starts[r + 1] - starts[r] for r in requests]
    begins = [sum(counts[:index]) for index in range(len(counts) + 1)]
    lengths = [batch.seq_lens_host[r] for r in requests]
    device = batch.seq_lens.device
    return AttentionBatch(
        query_start_loc=torch.tensor(begins, dtype=torch.int32).to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32).to(device),
        block_table=table.to(device=device, dtype=batch.block_table.dtype),
        slot_mapping=slots.to(device),
        query_start_loc_host=begins,
        seq_lens_host=lengths,
        num_requests=len(counts),
        num_tokens=begins[-1],
        max_query_len=max(counts),
        max_seq_len=max(lengths),
    )
