"""Paged attention: which kernels serve a step, and with which tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels_triton import attention_kernels as kernels
from quire.kernels_triton.launch import LaunchEntry, Launcher, ceil_div, power_of_two

_MIN_TILE = 16
"""Rows that a matrix unit takes at least."""
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What all layers of a group share."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    block_size: int
    scale: float
    window: int = 0
    """Tokens that a query sees, itself included; 0: all before it."""
    chunk: int = 0
    """Length of the chunks within which queries see; 0: all."""
    soft_cap: float = 0.0
    """0: none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedStep:
    """One step's requests, on the device, and what the host knows of them."""

    query_start_loc: Tensor
    """int32 [R + 1]."""
    seq_lens: Tensor
    """int32 [R]."""
    block_table: Tensor
    """int32 [R, max_blocks], dense rows."""
    num_tokens: int
    has_decodes: bool
    """Some request has one new token."""
    has_prefills: bool
    """Some request has more."""
    num_splits: int
    """Parts of a decoded request's context, at most `MAX_SPLITS`."""
    partial: Tensor | None
    """float32 [R, Hq, num_splits, Dv]; None for one part."""
    partial_log: Tensor | None
    """float32 [R, Hq, num_splits]."""

    @property
    def num_requests(self) -> int:
        """R."""
        return self.seq_lens.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedCache:
    """One layer's cache: k [N, B, Hk, D], v [N, B, Hk, Dv], of one dtype.

    k_scale, v_scale float32 [N, B, Hk] where the dtype is int8: value = stored * scale. A latent
    cache has `k` as its `v`.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


def choose_splits(
    launcher: Launcher, *, num_requests: int, num_kv_heads: int, max_seq_len: int
) -> int:
    """In how many parts decoded contexts are cut so that every compute unit has work.

    The table's row `splits` says how much work a unit wants, and below how many tokens a part costs
    more to join than it saves.
    """
    row = launcher.find("splits").constants
    wanted = launcher.table.facts["compute_units"] * row["PROGRAMS_PER_UNIT"]
    parts = wanted // max(1, num_requests * num_kv_heads)
    parts = min(parts, ceil_div(max_seq_len, row["MIN_TOKENS"]), MAX_SPLITS)
    # A power of two, so that few versions of the kernel are compiled.
    return power_of_two(parts + 1) // 2 if parts > 1 else 1


def paged_attention(
    launcher: Launcher,
    shape: AttentionShape,
    step: PagedStep,
    q: Tensor,
    cache: PagedCache,
    out: Tensor,
    *,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Attends; the step's keys and values are in the cache already.

    q [T, Hq, D] and out [T, Hq, Dv] with dense last dimensions, of one dtype; sinks, alibi_slopes
    float32 [Hq]. Mutates out alone. Requests with one new token go to the split kernel, whoever
    else is in the step, so a token's arithmetic does not depend on the mix.
    """
    call = _Call(launcher, shape, step, q, cache, out, sinks, alibi_slopes)
    if step.has_decodes:
        call.decode()
    if step.has_prefills:
        call.prefill()


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    launcher: Launcher
    shape: AttentionShape
    step: PagedStep
    q: Tensor
    cache: PagedCache
    out: Tensor
    sinks: Tensor | None
    alibi_slopes: Tensor | None

    def prefill(self) -> None:
        entry = self._entry("prefill")
        group = self._group
        tile = max(entry.constants["BLOCK_M"], _MIN_TILE, power_of_two(group))
        num_blocks = self.step.num_tokens // (tile // group) + self.step.num_requests
        self.launcher.start(
            kernels.prefill_kernel,
            (self.shape.num_kv_heads, num_blocks),
            [
                *self._tensors(),
                self.out,
                *self._requests(),
                self.step.num_requests,
                *self._numbers(),
            ],
            {"MIN_QUERIES": 2, **self._constants(entry), "BLOCK_M": tile},
            entry,
        )

    def decode(self) -> None:
        entry = self._entry("decode")
        step, splits = self.step, self.step.num_splits
        # With one part nothing is written there, but the kernel wants a pointer.
        partial = self.out if step.partial is None else step.partial
        partial_log = self.out if step.partial_log is None else step.partial_log
        tile = max(_MIN_TILE, power_of_two(self._group))
        self.launcher.start(
            kernels.decode_kernel,
            (self.shape.num_kv_heads, step.num_requests, splits),
            [*self._tensors(), self.out, partial, partial_log, *self._requests(), *self._numbers()],
            {"SPLITS": splits, **self._constants(entry), "BLOCK_M": tile},
            entry,
        )
        if splits > 1:
            self._combine(partial, partial_log)

    def _combine(self, partial: Tensor, partial_log: Tensor) -> None:
        splits = self.step.num_splits
        v_size = self.shape.v_head_size
        self.launcher.start(
            kernels.combine_kernel,
            (self.shape.num_heads, self.step.num_requests),
            [partial, partial_log, self.out, self.step.query_start_loc, *self.out.stride()[:2]],
            {
                "NUM_HEADS": self.shape.num_heads,
                "SPLITS": splits,
                "BLOCK_S": power_of_two(splits),
                "DV": v_size,
                "BLOCK_DV": power_of_two(v_size),
            },
            self.launcher.find("combine"),
        )

    @property
    def _group(self) -> int:
        return self.shape.num_heads // self.shape.num_kv_heads

    def _entry(self, kernel: str) -> LaunchEntry:
        return self.launcher.find(
            kernel,
            head_size=max(self.shape.head_size, self.shape.v_head_size),
            item_size=self.q.element_size(),
        )

    def _tensors(self) -> list[Tensor]:
        cache = self.cache
        k_scale = cache.k if cache.k_scale is None else cache.k_scale
        v_scale = cache.v if cache.v_scale is None else cache.v_scale
        return [self.q, cache.k, cache.v, k_scale, v_scale]

    def _requests(self) -> list[Tensor]:
        step = self.step
        sinks = self.q if self.sinks is None else self.sinks
        slopes = self.q if self.alibi_slopes is None else self.alibi_slopes
        return [step.query_start_loc, step.seq_lens, step.block_table, sinks, slopes]

    def _numbers(self) -> list[float | int]:
        return [
            self.shape.scale,
            self.shape.soft_cap,
            *self.q.stride()[:2],
            *self.cache.k.stride()[:3],
            *self.cache.v.stride()[:3],
            self.step.block_table.stride(0),
            *self.out.stride()[:2],
        ]

    def _constants(self, entry: LaunchEntry) -> dict[str, int | bool]:
        shape = self.shape
        return {
            "GROUP": self._group,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "PAGE": shape.block_size,
            "D": shape.head_size,
            "DV": shape.v_head_size,
            "BLOCK_D": max(_MIN_TILE, power_of_two(shape.head_size)),
            "BLOCK_DV": max(_MIN_TILE, power_of_two(shape.v_head_size)),
            "BLOCK_N": entry.constants["BLOCK_N"],
            "WINDOW": shape.window,
            "CHUNK": shape.chunk,
            "HAS_CAP": shape.soft_cap > 0,
            "HAS_SINKS": self.sinks is not None,
            "HAS_ALIBI": self.alibi_slopes is not None,
            "HAS_SCALES": self.cache.k_scale is not None,
        }


def make_partials(
    shape: AttentionShape, *, num_requests: int, num_splits: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the parts of decoded contexts; nothing for one part."""
    if num_splits == 1:
        return None, None
    size = (num_requests, shape.num_heads, num_splits)
    return (
        torch.empty((*size, shape.v_head_size), dtype=torch.float32, device=device),
        torch.empty(size, dtype=torch.float32, device=device),
    )
