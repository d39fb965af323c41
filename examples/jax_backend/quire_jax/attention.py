"""Paged attention in plain JAX: tiles of queries go over their request's keys a chunk at a time.

A tile holds queries of one request, so that all of it reads one row of the block table. The softmax
is kept up as chunks come, and no scores of a whole context are ever held.
Source: Kwon et al. 2023 (blocks), Milakov & Gimelshein 2018 (online softmax).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from quire_jax.pool import Pool, read

CHUNK_BLOCKS = 8
"""Blocks of keys that a tile reads at a time; block tables are padded to a multiple of it."""
_NEVER = 1 << 30
"""A position that no token has."""


def attend(
    q: Array,
    pool: Pool,
    table: Array,
    step: dict[str, Array],
    *,
    window: Array,
    scale: float,
    soft_cap: float | None,
) -> Array:
    """Attention of queries [T, Hq, D] over the pool; [T, Hq, D] in q's dtype.

    table [R, blocks] holds blocks of the pool. A query at position p sees p - window < k <= p.
    Tokens that stand in no tile get zeros. Nothing that a tile does not see can reach its result,
    whatever it holds.
    """
    num_tokens, num_heads, size = q.shape
    num_kv_heads = pool[0].shape[2]
    span = CHUNK_BLOCKS * pool[0].shape[1]
    tiles = step["tiles"]
    positions = step["positions"].at[tiles].get(mode="fill", fill_value=-1)
    queries = q.at[tiles].get(mode="fill", fill_value=0).astype(jnp.float32) * scale
    queries = queries.reshape(*tiles.shape, num_kv_heads, num_heads // num_kv_heads, size)
    table = table[step["tile_requests"]]

    def chunk(number: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        highest, total, mixed = state
        blocks = lax.dynamic_slice_in_dim(table, number * CHUNK_BLOCKS, CHUNK_BLOCKS, axis=1)
        at = number * span + jnp.arange(span)
        is_seen = (at <= positions[..., None]) & (at > positions[..., None] - window)
        k, v = (read(half, blocks).reshape(-1, span, num_kv_heads, size) for half in pool)
        # Zero times what stands in an unused slot would be NaN where that is.
        v = jnp.where(is_seen.any(axis=1)[..., None, None], v, 0.0)
        scores = jnp.einsum("nqhgd,nshd->nhgqs", queries, k, precision=lax.Precision.HIGHEST)
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        scores = jnp.where(is_seen[:, None, None], scores, -jnp.inf)
        new_highest = jnp.maximum(highest, scores.max(axis=-1))
        shift = jnp.where(jnp.isfinite(new_highest), new_highest, 0.0)
        weights = jnp.exp(scores - shift[..., None])
        kept = jnp.exp(highest - shift)
        added = jnp.einsum("nhgqs,nshd->nhgqd", weights, v, precision=lax.Precision.HIGHEST)
        return new_highest, total * kept + weights.sum(axis=-1), mixed * kept[..., None] + added

    shape = (tiles.shape[0], num_kv_heads, num_heads // num_kv_heads, tiles.shape[1])
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, size)))
    lowest = jnp.where(positions >= 0, positions, _NEVER).min()
    first = jnp.maximum(lowest - window + 1, 0) // span
    _, total, mixed = lax.fori_loop(first, positions.max() // span + 1, chunk, start)
    mixed = mixed / jnp.where(total > 0, total, 1.0)[..., None]
    found = mixed.transpose(0, 3, 1, 2, 4).reshape(*tiles.shape, num_heads, size)
    out = jnp.zeros((num_tokens, num_heads, size), q.dtype)
    return out.at[tiles].set(found.astype(q.dtype), mode="drop")
