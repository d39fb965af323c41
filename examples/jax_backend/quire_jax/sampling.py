"""From logits to tokens, as the contract says it in `Ops` and `SamplingTensors`. Compiled by shape.

Lists of unequal lengths come padded with rows past the last one, which are dropped.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

_WORD = 32


@jax.jit
def most_likely(logits: Array) -> tuple[Array, Array]:
    """(the largest logit of each row, lowest id on a tie; whether a row has a finite largest)."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.isfinite(logits.max(axis=-1))


@jax.jit
def apply_mask(logits: Array, mask: Array) -> Array:
    """-inf where bit i % 32 of word i // 32 is not set. mask uint32 [R, words]."""
    bits = (mask[:, :, None] >> jnp.arange(_WORD, dtype=jnp.uint32)) & 1
    is_allowed = bits.reshape(len(logits), -1)[:, : logits.shape[1]]
    return jnp.where(is_allowed, logits, -jnp.inf)


@jax.jit
def add_bias(logits: Array, rows: Array, token_ids: Array, bias: Array) -> Array:
    """logits[rows, token_ids] += bias; entries are distinct, each [M]."""
    return logits.at[rows, token_ids].add(bias, mode="drop")


@jax.jit
def apply_penalties(
    logits: Array, rows: Array, token_ids: Array, counts: Array, settings: Array
) -> Array:
    """Penalises tokens that a row has seen, as `Ops.apply_penalties` says.

    rows, token_ids, counts [M]: one entry for each distinct token; settings [R, 3].
    """
    repetition, frequency, presence = settings.at[rows].get(mode="fill", fill_value=1.0).T
    seen = logits.at[rows, token_ids].get(mode="fill", fill_value=0.0)
    seen = jnp.where(seen > 0, seen / repetition, seen * repetition)
    seen = seen - frequency * counts - jnp.where(counts > 0, presence, 0.0)
    return logits.at[rows, token_ids].set(seen, mode="drop")


@partial(jax.jit, static_argnames=("has_filter",))
def sample(logits: Array, settings: dict[str, Array], *, has_filter: bool) -> Array:
    """One token a row, int32 [R], as `Ops.sample` says; temperature 0 is greedy."""
    greedy = jnp.argmax(logits, axis=-1)
    is_greedy = settings["temperature"] == 0
    scaled = logits / jnp.where(is_greedy, 1.0, settings["temperature"])[:, None]
    probabilities = jax.nn.softmax(scaled, axis=-1)
    if has_filter:
        probabilities = _filtered(logits, probabilities, settings)
    is_kept = probabilities > 0
    sums = jnp.cumsum(probabilities, axis=-1)
    is_past = is_kept & (sums > settings["uniform"][:, None] * sums[:, -1:])
    # Rounding may leave nobody past the number; then it is the last that was kept.
    last = logits.shape[1] - 1 - jnp.argmax(is_kept[:, ::-1], axis=-1)
    drawn = jnp.where(is_past.any(axis=-1), jnp.argmax(is_past, axis=-1), last)
    return jnp.where(is_greedy, greedy, drawn).astype(jnp.int32)


@partial(jax.jit, static_argnames=("num_top",))
def logprobs(logits: Array, tokens: Array, *, num_top: int) -> tuple[Array, Array, Array, Array]:
    """(of the tokens [R], their ranks [R], the best ids and theirs [R, num_top])."""
    everything = jax.nn.log_softmax(logits, axis=-1)
    chosen = tokens[:, None]
    selected = jnp.take_along_axis(everything, chosen, axis=-1)[:, 0]
    ranks = (logits > jnp.take_along_axis(logits, chosen, axis=-1)).sum(axis=-1) + 1
    _, top_ids = lax.top_k(logits, num_top)
    return selected, ranks, top_ids, jnp.take_along_axis(everything, top_ids, axis=-1)


def _filtered(logits: Array, probabilities: Array, settings: dict[str, Array]) -> Array:
    """Zero where top-k, top-p or min-p forbid, in this order."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ordered = jnp.take_along_axis(logits, order, axis=-1)
    sizes = jnp.take_along_axis(probabilities, order, axis=-1)
    last = jnp.take_along_axis(ordered, settings["top_k"][:, None] - 1, axis=-1)
    sizes = jnp.where(ordered >= last, sizes, 0.0)
    sums = jnp.cumsum(sizes, axis=-1)
    top_p = settings["top_p"][:, None]
    is_needed = (sums - sizes < top_p * sums[:, -1:]) | (top_p >= 1)
    is_large = sizes >= settings["min_p"][:, None] * sizes[:, :1]
    sizes = jnp.where(is_needed & is_large, sizes, 0.0)
    return jnp.take_along_axis(sizes, jnp.argsort(order, axis=-1), axis=-1)
