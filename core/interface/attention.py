"""Attention over a paged cache: what a group of layers needs, and who serves it.

R requests own the T rows of a step: request r owns query rows [query_start_loc[r],
query_start_loc[r + 1]), which are the last ones of its seq_lens[r] tokens of context:

    [0, seq_lens[r] - num_new)             in the cache before this step
    [seq_lens[r] - num_new, seq_lens[r])   written by this step's forward, before it attends

Token t of request r lies in block block_table[r, t // block_size], at offset t % block_size; its
slot is block * block_size + offset.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quire.core.interface.contract import check_contract
from quire.core.interface.errors import Reason

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a group of layers needs of its attention; the same for every layer of the group."""

    num_heads: int
    num_kv_heads: int
    """Divides `num_heads`; query head h reads key head h // (num_heads // num_kv_heads)."""
    head_size: int
    """Of queries and keys."""
    v_head_size: int
    """Of values and of the output."""
    scale: float
    """Multiplies q . k."""
    dtype: str
    """Of q, k, v and out."""
    cache_dtype: str
    """In which keys and values are stored: a plain dtype; `float8_e4m3fn` or `float8_e5m2`, which
    saturate; or `int8`, with one float32 scale for each token and head, the largest magnitude
    over 127, by which it divides in float32 before it rounds. Attention sees what is stored,
    this step's tokens included.
    """
    block_size: int
    """Tokens in a block."""
    kind: str = "causal"
    """`causal`, `sliding_window`, `chunked`, `bidirectional`, `cross`, `mla`, `vendor:name`.

    `mla`: causal, with one key head whose first `v_head_size` features are the values: the cache
    holds the key alone, and `forward` reads no `v`. Source: DeepSeek-V2 report, section 2.1.
    `bidirectional`: a token sees all tokens of its request that are in the cache or in this step.
    """
    window: int | None = None
    """For `sliding_window`: position p sees j with p - window < j <= p.

    For `chunked`: the chunk's length.
    """
    soft_cap: float | None = None
    """Scores become cap * tanh(score / cap) before the softmax."""
    has_sinks: bool = False
    """One more logit a head in the softmax's sum, with no value (`forward` gets `sinks`)."""
    has_alibi: bool = False
    """A linear bias -slope * (p - j) a head (`forward` gets `alibi_slopes`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayout:
    """How one layer keeps its keys and values.

    The core counts blocks; it never looks inside one.
    """

    tensors: tuple[CacheTensor, ...]
    """What one layer allocates."""
    bytes_per_block: int
    """Of one layer: the sum over `tensors`, padding included."""
    description: str
    """For people: `k, v [blocks, 16, 2, 64] float32`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTensor:
    """One tensor of a layer's cache."""

    name: str
    """`k`, `v`, `scale`, `latent`, `state`."""
    block_shape: tuple[int, ...]
    """Of one block; the tensor is [num_blocks, *block_shape]."""
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCache:
    """The cache of one layer, on the device."""

    tensors: dict[str, Tensor]
    """By `CacheTensor.name`, each [num_blocks, *block_shape]."""
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionBatch:
    """One step, for one cache group. Tensors live on the device; the host lists say the same."""

    query_start_loc: Tensor
    """int32 [R + 1]."""
    seq_lens: Tensor
    """int32 [R]. Context of each request, this step's tokens included."""
    block_table: Tensor
    """int32 [R, max_blocks].

    Entries past ceil(seq_lens / block_size), and those wholly before a sliding window, are
    undefined.
    """
    slot_mapping: Tensor
    """int64 [T]. Where each new token's key and value go."""
    query_start_loc_host: Sequence[int]
    seq_lens_host: Sequence[int]
    num_requests: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int


class AttentionPlan:
    """What a backend prepared for one step; frozen, and shared by the layers of the group.

    Opaque to the core.
    """


class AttentionBackend(ABC):
    """Attention for layers of one `AttentionSpec`, with the backend's own cache layout."""

    spec: AttentionSpec

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        check_contract(cls, AttentionBackend)

    @abstractmethod
    def provider(self) -> str:
        """Who serves it, as `quire plan` shows it: `reference`, `native:avx512`."""

    @classmethod
    @abstractmethod
    def reasons_against(cls, spec: AttentionSpec) -> list[Reason]:
        """Everything in `spec` that this attention cannot do; empty: it serves it."""

    @abstractmethod
    def cache_layout(self) -> CacheLayout:
        """How one layer of the spec keeps its keys and values."""

    @abstractmethod
    def allocate(self, num_blocks: int) -> LayerCache:
        """The cache of one layer. Contents are undefined.

        Raises: DeviceOutOfMemory.
        """

    @abstractmethod
    def plan(self, batch: AttentionBatch) -> AttentionPlan:
        """Prepares one step; called once, before the first layer of the group."""

    @abstractmethod
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
        """Writes this step's keys and values to the cache, attends, and returns `out`.

        q [T, Hq, D], k [T, Hk, D], v [T, Hk, Dv] (views with a dense last dimension), out [T, Hq,
        Dv] contiguous, all of spec.dtype; sinks, alibi_slopes float32 [Hq]. out[t] = sum_j
        softmax_j(scale * q[t] . k[j]) v[j] over what the spec lets t see. Accumulates in float32.
        Mutates the slots of `slot_mapping` and all of `out`; right whatever all other slots hold,
        NaN included.
        Source: Vaswani et al. 2017, eq. 1; block-wise softmax: Milakov & Gimelshein 2018.
        """

    def write(self, k: Tensor, v: Tensor, cache: LayerCache, slot_mapping: Tensor) -> None:
        """Writes keys and values as `forward` does, and attends nothing; claimed as `cache_rows`.

        k [n, Hk, D], v [n, Hk, Dv] (views with a dense last dimension; `mla` reads no `v`), of
        spec.dtype; slot_mapping int64 [n], each slot once. Mutates those slots alone.
        """
        raise NotImplementedError

    def read_keys(self, cache: LayerCache, slots: Tensor) -> Tensor:
        """Keys as attention sees them; claimed as `cache_rows`.

        slots int64 [n], in any order. Returns [n, Hk, D] of spec.dtype. Mutates nothing.
        """
        raise NotImplementedError

    @abstractmethod
    def copy_blocks(self, cache: LayerCache, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies whole blocks within one layer's cache, bit for bit.

        Sources and targets do not overlap.
        """

    @abstractmethod
    def export_blocks(self, cache: LayerCache, block_ids: Sequence[int]) -> Tensor:
        """Blocks in the canonical layout, on the host.

        float32 [n, block_size, Hk, D + Dv], keys before values; [n, block_size, 1, D] for `mla`.
        Any two backends exchange pages through this layout.
        """

    @abstractmethod
    def import_blocks(self, cache: LayerCache, block_ids: Sequence[int], blocks: Tensor) -> None:
        """Writes blocks that another backend exported."""
