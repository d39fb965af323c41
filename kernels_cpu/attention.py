"""Paged attention and the writing of the paged cache."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    import torch
    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu

_INT8 = 1
_NARROW = {"torch.int8": _INT8, "torch.float8_e4m3fn": 2, "torch.float8_e5m2": 3}


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    window: int,
    soft_cap: float,
    out: Tensor,
    *,
    chunk: int = 0,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Causal attention of new tokens over their paged context, this step's keys included.

    q [T, Hq, D], out [T, Hq, Dv]; k_cache [N, B, Hk, D], v_cache [N, B, Hk, Dv], Hq a multiple of
    Hk; q and out of one dtype (float32, bfloat16 or float16), on the CPU, the last dimension dense.
    The caches have that dtype too, or both are float8_e4m3fn, or float8_e5m2, or int8 with
    k_scales and v_scales float32 [N, B, Hk], contiguous. `v_cache` may be a view of `k_cache`: many
    query heads then read one latent once.
    block_table int32 [R, max_blocks], seq_lens int32 [R], query_start_loc int32 [R + 1]. Request r
    owns rows [query_start_loc[r], query_start_loc[r + 1]), the last of its seq_lens[r] tokens.

    out[t] = sum_j softmax_j(cap(scale * q[t] . k[j])) v[j], over the j that the position p of t
    sees: j <= p; j > p - window unless window is 0; j >= p // chunk * chunk unless chunk is 0.
    cap(s) = soft_cap * tanh(s / soft_cap) unless soft_cap is 0. `sinks` float32 [Hq] adds one score
    a head with no value; `alibi_slopes` float32 [Hq] adds slope * (j - p).

    Accumulates in float32 and rounds once. A row's result is bitwise the same whoever is in the
    batch, however its prompt was cut into chunks, and with any number of threads. Writes all of
    `out`; right whatever the slots that no row sees hold, NaN included.
    Raises: ValueError, TypeError, IndexError for arguments that do not fit each other.
    Source: Vaswani et al. 2017, eq. 1; block-wise softmax: Milakov & Gimelshein 2018.
    """
    native.require_native()
    stored = stored_as(q.dtype, k_cache.dtype)
    sizes, strides = _check(q, k_cache, v_cache, out, block_table, seq_lens, query_start_loc)
    check_scales("k_scales", k_scales, k_cache, stored)
    check_scales("v_scales", v_scales, v_cache, stored)
    for name, per_head in (("sinks", sinks), ("alibi_slopes", alibi_slopes)):
        if per_head is not None:
            checks.check_list(name, per_head, "float32", q.shape[1])
    tensors = (q, k_cache, v_cache, k_scales, v_scales, out)
    lists = (block_table, seq_lens, query_start_loc, sinks, alibi_slopes)
    _cpu.paged_attention(  # type: ignore[call-arg]
        checks.dtype_code(q.dtype),
        stored,
        *map(checks.address_of, tensors + lists),  # type: ignore[arg-type]
        sizes,
        strides,
        scale,
        window,
        chunk,
        soft_cap,
    )


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes and strides, in the order in which the compiled module takes them."""
    dtype = q.dtype
    q_strides = checks.check_dense("q", q, dtype, 3)
    k_strides = checks.check_dense("k_cache", k_cache, k_cache.dtype, 4)
    v_strides = checks.check_dense("v_cache", v_cache, k_cache.dtype, 4)
    out_strides = checks.check_dense("out", out, dtype, 3)
    num_tokens, num_heads, head_size = q.shape
    num_blocks, block_size, num_kv_heads, _ = k_cache.shape
    v_head_size = v_cache.shape[3]
    checks.check_shape("k_cache", k_cache, (num_blocks, block_size, num_kv_heads, head_size))
    checks.check_shape("v_cache", v_cache, (num_blocks, block_size, num_kv_heads, v_head_size))
    checks.check_shape("out", out, (num_tokens, num_heads, v_head_size))
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_kv_heads} key heads evenly")
    num_requests = seq_lens.shape[0]
    checks.check_table("block_table", block_table)
    checks.check_list("seq_lens", seq_lens, "int32")
    checks.check_list("query_start_loc", query_start_loc, "int32", num_requests + 1)
    if block_table.shape[0] < num_requests:
        raise ValueError(f"block_table has {block_table.shape[0]} rows for {num_requests} requests")
    heads = (num_heads, num_kv_heads, head_size, v_head_size)
    sizes = (num_requests, *heads, block_size, num_tokens, num_blocks, block_table.shape[1])
    strides = (*q_strides[:2], *out_strides[:2], *k_strides[:3], *v_strides[:3])
    return sizes, (*strides, block_table.stride(0))


def write_cache(
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Puts the keys and values of a step where they belong.

    k [T, Hk, D], v [T, Hk, Dv] with a dense last dimension; k_cache [N, B, Hk, D], v_cache
    [N, B, Hk, Dv], v and v_cache None for a cache of keys alone; slot_mapping int64 (or int32) [T],
    distinct: token t goes to block slot // B at offset slot % B. The caches have the dtype of k, or
    float8_e4m3fn or float8_e5m2, which saturate, or int8: round(x / s), s = max |x| / 127 of each
    token and head, which goes to the scales float32 [N, B, Hk]. Mutates those slots and nothing
    else. Raises: ValueError, TypeError, IndexError for arguments that do not fit each other.
    """
    native.require_native()
    slots = slot_mapping.long()
    checks.check_list("slot_mapping", slots, "int64", k.shape[0])
    _write("k", k, k_cache, k_scales, slots)
    if v is not None and v_cache is not None:
        _write("v", v, v_cache, v_scales, slots)


def _write(name: str, source: Tensor, cached: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    stored = stored_as(source.dtype, cached.dtype)
    source_strides = checks.check_dense(name, source, source.dtype, 3)
    cache_strides = checks.check_dense(f"{name}_cache", cached, cached.dtype, 4)
    num_tokens, num_heads, head_size = source.shape
    num_blocks, block_size = cached.shape[:2]
    checks.check_shape(f"{name}_cache", cached, (num_blocks, block_size, num_heads, head_size))
    check_scales(f"{name}_scales", scales, cached, stored)
    if slots.shape[0] != num_tokens:
        raise ValueError(f"{name} has {num_tokens} tokens for {slots.shape[0]} slots")
    _cpu.write_cache(
        checks.dtype_code(source.dtype) if stored else 0,
        stored,
        source.element_size(),
        source.data_ptr(),
        cached.data_ptr(),
        checks.address_of(scales),
        slots.data_ptr(),
        (num_tokens, num_heads, head_size, block_size, num_blocks),
        (*source_strides[:2], *cache_strides[:3]),
    )


@cache
def stored_as(dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """The number by which the compiled module knows how a cache keeps numbers."""
    if cache_dtype is dtype:
        return 0
    code = _NARROW.get(str(cache_dtype))
    if code is None:
        raise TypeError(f"a cache of {cache_dtype} for {dtype}; narrower are {', '.join(_NARROW)}")
    return code


def check_scales(name: str, scales: Tensor | None, cached: Tensor, stored: int) -> None:
    """Scales float32 [N, B, Hk] where the cache is int8, and nowhere else."""
    if (stored == _INT8) != (scales is not None):
        raise ValueError(f"{name}: an int8 cache has scales, and no other has")
    if scales is not None:
        checks.check_contiguous(name, scales, "float32", tuple(cached.shape[:3]))
