"""The cache: keys and values of all layers in one pool of blocks.

bfloat16 is kept as its bits, in uint16: XLA widens a bfloat16 array that is written in place to
float32 on hosts, all of it and at every write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt
from jax import Array, lax

Pool = tuple[Array, Array]
"""Keys and values, each [blocks of all layers, block_size, Hk, D], float32 or bits of bfloat16."""


def make_pool(shape: tuple[int, ...], dtype: str, device: jax.Device) -> Pool:
    """A pool of zeros."""
    kind = jnp.uint16 if dtype == "bfloat16" else jnp.float32
    return jnp.zeros(shape, kind, device=device), jnp.zeros(shape, kind, device=device)


def write(part: Array, blocks: Array, offsets: Array, x: Array) -> Array:
    """x [T, Hk, D] into slots [T] of one half of a pool; in place where it was donated."""
    if part.dtype == jnp.uint16:
        x = lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return part.at[blocks, offsets].set(x.astype(part.dtype))


def read(part: Array, blocks: Array) -> Array:
    """Blocks of one half of a pool as float32: [*blocks, block_size, Hk, D]."""
    found = part[blocks]
    if part.dtype == jnp.uint16:
        found = lax.bitcast_convert_type(found, jnp.bfloat16)
    return found.astype(jnp.float32)


def copy_blocks(pool: Pool, source: Sequence[int], target: Sequence[int]) -> Pool:
    """The pool with blocks `source` written over `target`."""
    sources, targets = np.asarray(source, np.int32), np.asarray(target, np.int32)
    keys, values = (part.at[targets].set(part[sources]) for part in pool)
    return keys, values


def export_blocks(pool: Pool, blocks: Sequence[int]) -> npt.NDArray[np.float32]:
    """Blocks on the host: float32 [n, block_size, Hk, 2D], keys before values."""
    at = jnp.asarray(blocks, jnp.int32)
    halves = [np.asarray(read(part, at)) for part in pool]
    return np.concatenate(halves, axis=-1)


def import_blocks(pool: Pool, blocks: Sequence[int], numbers: npt.NDArray[np.float32]) -> Pool:
    """The pool with blocks as `export_blocks` gave them."""
    at = np.asarray(blocks, np.int32)
    halves: list[npt.NDArray[Any]] = np.split(numbers, 2, axis=-1)
    if pool[0].dtype == jnp.uint16:
        halves = [half.astype(ml_dtypes.bfloat16).view(np.uint16) for half in halves]
    keys, values = (part.at[at].set(half) for part, half in zip(pool, halves, strict=True))
    return keys, values
