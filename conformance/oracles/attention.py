"""Attention of one request over its whole context, with nothing paged."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from quire.core.interface import AttentionSpec

Array = npt.NDArray[Any]


def sees(spec: AttentionSpec, query: int, key: int) -> bool:
    """Whether the token at position `query` sees the one at `key`, by `AttentionSpec.kind`."""
    if key > query:
        return False
    if spec.kind == "sliding_window":
        assert spec.window is not None, spec
        return key > query - spec.window
    if spec.kind == "chunked":
        assert spec.window is not None, spec
        return key // spec.window == query // spec.window
    return True


def paged(
    spec: AttentionSpec,
    q: Array,
    k: Array,
    v: Array,
    *,
    first: int = 0,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
) -> Array:
    """What the tokens from position `first` on see: [n - first, Hq, Dv].

    q [n, Hq, D], k [n, Hk, D], v [n, Hk, Dv] of one request. out[p] = sum_j softmax_j(scale * q[p]
    . k[j]) v[j] over the j that p sees; query head h reads key head h // (Hq / Hk).
    Source: Vaswani et al. 2017, eq. 1; soft cap: Gemma 2 report, section 2; ALiBi: Press et al.
    2021, eq. 1; sinks: gpt-oss model card, section 2.
    """
    group = spec.num_heads // spec.num_kv_heads
    out = np.zeros((len(q) - first, spec.num_heads, spec.v_head_size), dtype=q.dtype)
    for position in range(first, len(q)):
        seen = np.array([j for j in range(len(q)) if sees(spec, position, j)])
        for head in range(spec.num_heads):
            keys, values = k[seen, head // group], v[seen, head // group]
            scores = keys @ q[position, head] * q.dtype.type(spec.scale)
            if spec.soft_cap is not None:
                scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[head] * (position - seen).astype(q.dtype)
            sink = None if sinks is None else sinks[head]
            out[position - first, head] = _weights(scores, sink) @ values
    return out


def _weights(scores: Array, sink: Any) -> Array:
    """The softmax of scores [S]; a sink takes its share of the sum and has no value."""
    top = scores.max() if sink is None else max(scores.max(), sink)
    powers = np.exp(scores - top)
    total = powers.sum() if sink is None else powers.sum() + np.exp(sink - top)
    return np.asarray(powers / total)
