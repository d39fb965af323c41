"""Layers with a state, one token after the other. Each gives its result and the states after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None,
    states: Array,
    starts: Sequence[int],
    *,
    activation: str,
) -> tuple[Array, Array]:
    """out[t] = act(sum_w weight[:, w] input[t - W + 1 + w] + bias). Source: Gu & Dao 2023, 3.4."""
    out, after = np.zeros_like(x), states.copy()
    for s in range(len(starts) - 1):
        inputs = list(states[s].T)
        for t in range(starts[s], starts[s + 1]):
            inputs.append(x[t])
            total = sum(
                weight[:, w] * inputs[len(inputs) - weight.shape[1] + w]
                for w in range(weight.shape[1])
            )
            total = total if bias is None else total + bias
            out[t] = _silu(total) if activation == "silu" else total
        after[s] = np.stack(inputs[len(inputs) - states.shape[2] :], axis=-1)
    return out, after


def selective_scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array | None,
    states: Array,
    starts: Sequence[int],
) -> tuple[Array, Array]:
    """h = exp(dt a) h + dt b x; out = h . c + d x. Source: Gu & Dao 2023, eq. 2."""
    out, after = np.zeros_like(x), states.copy()
    for s, t in _steps(starts):
        h = np.exp(dt[t][:, None] * a) * after[s] + (dt[t] * x[t])[:, None] * b[t]
        after[s] = h
        out[t] = h @ c[t] + (0 if d is None else d * x[t])
    return out, after


def ssd_scan(
    x: Array,
    dt: Array,
    a: Array,
    b: Array,
    c: Array,
    d: Array | None,
    states: Array,
    starts: Sequence[int],
) -> tuple[Array, Array]:
    """Head by head: h = exp(dt a) h + dt x b^T; out = h c + d x.

    Source: Dao & Gu 2024, section 2.
    """
    out, after = np.zeros_like(x), states.copy()
    size = x.shape[1] // b.shape[1]
    for s, t in _steps(starts):
        for m in range(x.shape[1]):
            h = np.exp(dt[t, m] * a[m]) * after[s, m] + np.outer(
                dt[t, m] * x[t, m], b[t, m // size]
            )
            after[s, m] = h
            out[t, m] = h @ c[t, m // size] + (0 if d is None else d[m] * x[t, m])
    return out, after


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    beta: Array,
    states: Array,
    starts: Sequence[int],
) -> tuple[Array, Array]:
    """Head by head: h decays, then what it recalls for k moves by beta towards v; out = h^T q.

    Source: Yang, Kautz & Hatamizadeh 2024, eq. 10.
    """
    out, after = np.zeros_like(v), states.copy()
    size = v.shape[1] // q.shape[1]
    for s, t in _steps(starts):
        for m in range(v.shape[1]):
            key = k[t, m // size]
            h = np.exp(decay[t, m]) * after[s, m]
            h = h + np.outer(key, beta[t, m] * (v[t, m] - h.T @ key))
            after[s, m] = h
            out[t, m] = h.T @ q[t, m // size]
    return out, after


def _silu(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(x / (1 + np.exp(-x)))


def _steps(starts: Sequence[int]) -> list[tuple[int, int]]:
    """(sequence, row) in the order of time."""
    return [(s, t) for s in range(len(starts) - 1) for t in range(starts[s], starts[s + 1])]
