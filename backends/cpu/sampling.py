"""Sampling on a device that answers at once: the likeliest tokens first, all only if need be.

To sort 150 000 logits takes some seventy times as long as to find the largest 256, and those decide
nearly every row. Each shortcut checks itself and otherwise takes the long way, so the results are
those of the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.backends.reference import sampling
from quire.core.interface import SamplingTensors

_BLOCK = 512
_NUM_CANDIDATES = 256


def most_likely(logits: Tensor) -> Tensor:
    """The id of the largest logit of each row [R, V], the lowest on a tie: int64 [R].

    A maximum is found many times faster than its place, so the place is sought in one block alone.
    """
    num_rows, vocab_size = logits.shape
    whole = vocab_size // _BLOCK * _BLOCK
    if whole == 0 or not logits.is_contiguous():
        return logits.argmax(-1)
    maxima = logits[:, :whole].view(num_rows, -1, _BLOCK).amax(-1)
    if whole < vocab_size:
        maxima = torch.cat((maxima, logits[:, whole:].amax(-1, keepdim=True)), dim=-1)
    block = maxima.argmax(-1, keepdim=True) * _BLOCK
    ids = (block + torch.arange(_BLOCK, device=logits.device)).clamp_max_(vocab_size - 1)
    return ids.gather(-1, logits.gather(-1, ids).argmax(-1, keepdim=True)).squeeze(-1)


def top_ids(logits: Tensor, num_top: int) -> Tensor:
    """The ids of the largest logits of each row, best first, ties by lowest id: int64 [R, n]."""
    if num_top == 0 or num_top >= logits.shape[-1]:
        return sampling.top_ids(logits, num_top)
    values, ids = _candidates(logits, num_top + 1)
    result = ids[:, :num_top]
    # Of equals at the border torch takes any: then look again.
    is_tied = values[:, num_top] == values[:, num_top - 1]
    for row in is_tied.nonzero().flatten().tolist():
        result[row] = sampling.top_ids(logits[row : row + 1], num_top)[0]
    return result


def filter_probabilities(probabilities: Tensor, logits: Tensor, settings: SamplingTensors) -> None:
    """Sets to zero, in place, what top-k, top-p and min-p exclude. Both float32 [R, V]."""
    vocab_size = logits.shape[-1]
    is_filtered = (settings.top_k < vocab_size) | (settings.top_p < 1) | (settings.min_p > 0)
    rows = (is_filtered & (settings.temperature > 0)).nonzero().flatten()
    if not len(rows):
        return
    if vocab_size > _NUM_CANDIDATES:
        rows = _filter_by_candidates(probabilities, logits, settings, rows)
    if len(rows):
        chosen = probabilities[rows]
        sampling.filter_probabilities(chosen, logits[rows], _take(settings, rows))
        probabilities[rows] = chosen


def _filter_by_candidates(
    probabilities: Tensor, logits: Tensor, settings: SamplingTensors, rows: Tensor
) -> Tensor:
    """Filters the rows whose survivors are all among their largest logits; returns the others."""
    values, ids = _candidates(logits[rows], _NUM_CANDIDATES)
    probable = probabilities[rows]
    ranked = probable.gather(-1, ids)
    chosen = _take(settings, rows)
    border = values[:, -1:]
    threshold = values.gather(-1, chosen.top_k.clamp(1, _NUM_CANDIDATES).unsqueeze(-1) - 1)
    is_inside = (chosen.top_k.unsqueeze(-1) <= _NUM_CANDIDATES) & (threshold > border)
    is_unlimited = chosen.top_k.unsqueeze(-1) >= logits.shape[-1]
    inner_mass = (ranked * (values >= threshold)).sum(-1, keepdim=True, dtype=torch.float64)
    outer_mass = probable.sum(-1, keepdim=True, dtype=torch.float64)
    kept = sampling.is_kept(ranked, values, chosen, torch.where(is_inside, inner_mass, outer_mass))
    reaches_border = (kept & (values == border)).any(-1)
    is_decided = (is_inside | is_unlimited).squeeze(-1) & ~reaches_border
    decided = rows[is_decided]
    probabilities.index_fill_(0, decided, 0.0)
    probabilities[decided.unsqueeze(-1), ids[is_decided]] = (ranked * kept)[is_decided]
    return rows[~is_decided]


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits of each row, best first, ties by lowest id, and their ids."""
    ids = logits.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _take(settings: SamplingTensors, rows: Tensor) -> SamplingTensors:
    """The settings of some rows."""
    return SamplingTensors(
        temperature=settings.temperature[rows],
        top_k=settings.top_k[rows],
        top_p=settings.top_p[rows],
        min_p=settings.min_p[rows],
        uniform=settings.uniform[rows],
        is_all_greedy=False,
        needs_filter=True,
    )
