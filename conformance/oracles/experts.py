"""Mixtures of experts, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.conformance.oracles import layers
from quire.core.interface import RoutingSpec

Array = npt.NDArray[Any]


def route(logits: Array, spec: RoutingSpec, correction_bias: Array | None) -> Array:
    """The weight of every expert for every token, 0 for those that were not chosen: [T, E].

    Source: Shazeer et al. 2017, eq. 3-5; DeepSeek-V3 report, section 2.1.2.
    """
    dense = np.zeros_like(logits)
    for token, row in enumerate(logits):
        scores = _scores(row, spec.score)
        choosing = scores if correction_bias is None else scores + correction_bias
        allowed = _allowed(choosing, spec)
        order = sorted(allowed, key=lambda expert: (-choosing[expert], expert))
        chosen = order[: spec.num_chosen]
        total = scores[chosen].sum() if spec.is_renormalised else logits.dtype.type(1)
        dense[token, chosen] = scores[chosen] / total * logits.dtype.type(spec.scale)
    return dense


def _scores(row: Array, score: str) -> Array:
    if score == "sigmoid":
        return np.asarray(1 / (1 + np.exp(-row)))
    powers = np.exp(row - row.max())
    return np.asarray(powers / powers.sum())


def _allowed(choosing: Array, spec: RoutingSpec) -> list[int]:
    """The experts of the groups that remain."""
    size = spec.num_experts // spec.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(spec.num_groups)]
    if spec.num_kept_groups >= spec.num_groups:
        return [expert for group in groups for expert in group]
    count = 2 if spec.group_score == "top2" else 1
    best = [np.sort(choosing[group])[::-1][:count].sum() for group in groups]
    kept = sorted(range(len(groups)), key=lambda g: (-best[g], g))[: spec.num_kept_groups]
    return [expert for g in sorted(kept) for expert in groups[g]]


def experts(
    x: Array,
    gate_up: Array,
    down: Array,
    biases: tuple[Array, Array] | None,
    weights: Array,
    expert_ids: Array,
    activation: Callable[[Array], Array],
    rounded: Callable[[Array], Array],
    *,
    weighs_input: bool,
) -> Array:
    """out[t] = sum_i w[t, i] down(act(gate_up(x[t]))) of expert e[t, i]: [T, H].

    `rounded` is what happens to intermediate results.

    Source: Shazeer et al. 2017, eq. 1.
    """
    out = np.zeros_like(x)
    for token, row in enumerate(x):
        for weight, expert in zip(weights[token], expert_ids[token], strict=True):
            taken = rounded(row * weight) if weighs_input else row
            both = rounded(gate_up[expert] @ taken + (biases[0][expert] if biases else 0))
            inner = rounded(activation(both))
            result = rounded(down[expert] @ inner + (biases[1][expert] if biases else 0))
            out[token] += result if weighs_input else result * weight
    return out


def gated(kind: str) -> Callable[[Array], Array]:
    """The activation of one expert: [2I] to [I]."""
    if kind == "clamped_swiglu":
        return _clamped_swiglu
    return lambda both: layers.gated_activation(both[None], kind)[0]


def _clamped_swiglu(both: Array) -> Array:
    gate, up = np.split(both, 2)
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    with np.errstate(over="ignore"):
        return np.asarray(gate / (1 + np.exp(-both.dtype.type(1.702) * gate)) * (up + 1))
