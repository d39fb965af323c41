"""A decoder in JAX: one compiled function for each shape of a step, whatever the family.

Layers are scanned over stacked weights, so the time that XLA takes does not grow with their number.
Keys and values of all layers lie in one pool of blocks; a layer's own begin at its `base`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from quire_jax.attention import attend
from quire_jax.decoder import Decoder, Rope
from quire_jax.pool import Pool, write

Weights = dict[str, Any]
"""`embedding` [V, H], `final_norm` [H], `cos` and `sin` [ropes, positions, F], `head` [V, H] unless
tied, and `layers`: names to arrays whose first dimension is the layer."""
NO_WINDOW = 1 << 30


@partial(jax.jit, static_argnames=("decoder",), donate_argnames=("pool",))
def forward(
    decoder: Decoder, weights: Weights, pool: Pool, step: dict[str, Array]
) -> tuple[Array, Pool]:
    """Runs the T tokens of a step: (hidden states [T, H], the pool with their keys and values).

    The given pool is donated. `step` is what `step_arrays.make_step_arrays` makes.
    """
    x = weights["embedding"][step["token_ids"]]
    if decoder.embedding_scale != 1.0:
        x = x * jnp.asarray(decoder.embedding_scale, x.dtype)
    cos, sin = (weights[name][:, step["positions"]] for name in ("cos", "sin"))

    def layer(carry: tuple[Array, Pool], part: dict[str, Array]) -> tuple[Any, None]:
        x, pool = carry
        angles = cos[part["rope"]], sin[part["rope"]]
        normed = _norm(x, part["input_norm"], decoder)
        mixed, pool = _attention(decoder, part, normed, angles, pool, step)
        if decoder.has_sandwich_norms:
            mixed = _norm(mixed, part["attention_output_norm"], decoder)
        x = x + mixed
        mixed = _mlp(decoder, part, _norm(x, part["mlp_norm"], decoder))
        if decoder.has_sandwich_norms:
            mixed = _norm(mixed, part["mlp_output_norm"], decoder)
        return (x + mixed, pool), None

    layers = weights["layers"] | {"base": step["bases"]}
    (x, pool), _ = lax.scan(layer, (x, pool), layers)
    return _norm(x, weights["final_norm"], decoder), pool


@jax.jit
def take_rows(hidden: Array, rows: Array) -> Array:
    """The hidden states [R, H] after which logits are wanted, of those of a step [T, H]."""
    return hidden[rows]


@partial(jax.jit, static_argnames=("decoder",))
def logits_of(decoder: Decoder, weights: Weights, hidden: Array) -> Array:
    """Logits float32 [R, V] of hidden states [R, H]."""
    table = weights["embedding"] if decoder.is_tied else weights["head"]
    logits = _linear(hidden, table).astype(jnp.float32)
    if decoder.logit_soft_cap is not None:
        logits = decoder.logit_soft_cap * jnp.tanh(logits / decoder.logit_soft_cap)
    return logits


def rotary_table(ropes: tuple[Rope, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines, float32 [ropes, length, F]. Source: Su et al. 2021, eq. 15."""
    positions = np.arange(length, dtype=np.float32)
    angles = np.stack([positions[:, None] * _frequencies(rope) for rope in ropes])
    return np.cos(angles), np.sin(angles)


def _frequencies(rope: Rope) -> np.ndarray:
    """Inverse frequencies, float32 [F]. `llama3`: Llama 3.1's own code, `apply_scaling`."""
    exponents = np.arange(0, rope.rotary_size, 2, dtype=np.float32) / np.float32(rope.rotary_size)
    frequencies = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.kind == "linear":
        return (frequencies / np.float32(rope.factor)).astype(np.float32)
    if rope.kind != "llama3":
        return frequencies
    turns = rope.original_length * frequencies / (2 * np.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    share = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    scaled = (1 - share) * frequencies / rope.factor + share * frequencies
    return scaled.astype(np.float32)


def _attention(
    decoder: Decoder,
    part: dict[str, Array],
    x: Array,
    angles: tuple[Array, Array],
    pool: Pool,
    step: dict[str, Array],
) -> tuple[Array, Pool]:
    num_tokens = x.shape[0]
    heads = _linear(x, part["qkv"], part.get("qkv_bias"))
    heads = heads.reshape(num_tokens, -1, decoder.head_size)
    edges = (decoder.num_heads, decoder.num_heads + decoder.num_kv_heads)
    q, k, v = jnp.split(heads, edges, axis=1)
    if decoder.has_qk_norm:
        q, k = _norm(q, part["q_norm"], decoder), _norm(k, part["k_norm"], decoder)
    q, k = _rotate(q, *angles), _rotate(k, *angles)
    blocks = part["base"] + step["slot_blocks"][part["group"]]
    keys, values = (
        write(half, blocks, step["slot_offsets"], x) for half, x in zip(pool, (k, v), strict=True)
    )
    out = attend(
        q,
        (keys, values),
        part["base"] + step["block_tables"][part["group"]],
        step,
        window=part["window"],
        scale=decoder.attention_scale,
        soft_cap=decoder.attention_soft_cap,
    )
    out = _linear(out.reshape(num_tokens, -1), part["output"], part.get("output_bias"))
    return out, (keys, values)


def _mlp(decoder: Decoder, part: dict[str, Array], x: Array) -> Array:
    gate, up = jnp.split(_linear(x, part["gate_up"], part.get("gate_up_bias")), 2, axis=-1)
    wide = gate.astype(jnp.float32)
    if decoder.activation == "silu":
        active = jax.nn.silu(wide)
    else:
        active = jax.nn.gelu(wide, approximate=decoder.activation == "gelu_tanh")
    gated = (active * up.astype(jnp.float32)).astype(x.dtype)
    return _linear(gated, part["down"], part.get("down_bias"))


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [..., K] times weight [N, K], summed in float32 and rounded once."""
    # Without a word a TPU would multiply float32 in bfloat16.
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    out = jnp.einsum(
        "tk,nk->tn", x, weight, precision=precision, preferred_element_type=jnp.float32
    )
    return (out if bias is None else out + bias.astype(jnp.float32)).astype(x.dtype)


def _norm(x: Array, weight: Array, decoder: Decoder) -> Array:
    """Root-mean-square norm over the last dimension; the weight is float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + decoder.norm_eps)
    return (wide * scale * weight).astype(x.dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (i, i + F) of heads [T, heads, D]. Source: Su et al. 2021, eq. 34."""
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[:, None], sin[:, None]
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
