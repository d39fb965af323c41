"""Which layer of the model each operator of a step belongs to, told from the order of names alone.

Every layer has one attention; the operators before it are the same in every layer, but for the
look-up of tokens before the first. After the last layer comes the head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

_ATTENTION = "paged_attention"
_LOOK_UP = "embedding"
_NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
HEAD = "head"


def layer_names(ops: Sequence[str]) -> list[str]:
    """`embedding`, a layer's number, or `head`, for each operator of one step."""
    attentions = [i for i, op in enumerate(ops) if op.startswith(_ATTENTION)]
    if not attentions:
        return [HEAD] * len(ops)
    first = next((i for i, op in enumerate(ops) if op in _NORMS), attentions[0])
    first = min(first, attentions[0])
    lead = attentions[0] - first
    starts = [first] + [max(a - lead, b + 1) for b, a in itertools.pairwise(attentions)]
    end = _end_of_layers(ops, attentions, starts)
    names = []
    for index in range(len(ops)):
        if index < first:
            names.append(_LOOK_UP)
        elif index >= end:
            names.append(HEAD)
        else:
            names.append(str(sum(start <= index for start in starts) - 1))
    return names


def _end_of_layers(ops: Sequence[str], attentions: Sequence[int], starts: Sequence[int]) -> int:
    if len(attentions) > 1:
        tail = starts[1] - attentions[0]
        return min(attentions[-1] + tail, len(ops))
    norms = [i for i, op in enumerate(ops) if op in _NORMS and i > attentions[0]]
    return norms[-1] if norms else len(ops)
