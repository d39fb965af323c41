"""How a token is chosen from logits, in plain torch and without waiting for the device.

Sums over the vocabulary are kept in float64: in float32 the running sum of 150 000 probabilities is
off by more than most of them, and a token's chance would depend on its id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quire.core.interface import SamplingTensors

_SUM_BLOCK = 256
"""Ids in a block of `draw`; about the root of a large vocabulary, so both levels are short."""


def most_likely(logits: Tensor) -> Tensor:
    """The id of the largest logit of each row of [R, V], the lowest on a tie: int64 [R].

    Torch documents that argmax returns the first of several maxima.
    """
    return logits.argmax(dim=-1)


def filter_probabilities(probabilities: Tensor, logits: Tensor, settings: SamplingTensors) -> None:
    """Sets to zero, in place, what top-k, top-p and min-p exclude. Both float32 [R, V].

    Orders by the logits: two different ones may have the same probability after rounding, and
    the order between them decides who is kept.
    """
    order = logits.argsort(dim=-1, descending=True, stable=True)
    ranked = probabilities.gather(-1, order)
    kept = is_kept(ranked, logits.gather(-1, order), settings)
    ranked.masked_fill_(~kept, 0.0)
    probabilities.scatter_(-1, order, ranked)


def is_kept(
    ranked: Tensor, ranked_logits: Tensor, settings: SamplingTensors, mass: Tensor | None = None
) -> Tensor:
    """Which of each row's tokens survive the filters, the most likely first: bool [R, n].

    ranked [R, n] holds the probabilities of the n most likely tokens, ranked_logits their logits.
    mass float64 [R, 1] is the sum of all that top-k keeps; None: they are all among the n.
    """
    last = settings.top_k.clamp(1, ranked.shape[-1]).unsqueeze(-1) - 1
    kept = ranked_logits >= ranked_logits.gather(-1, last)
    wide = ranked.double() * kept
    sums = wide.cumsum(-1)
    limit = settings.top_p.double().unsqueeze(-1)
    # 1 means everything: rounding must not cut the tail.
    kept &= (sums - wide < limit * (sums[:, -1:] if mass is None else mass)) | (limit >= 1)
    return kept & (ranked >= settings.min_p.unsqueeze(-1) * ranked[:, :1])


def draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first id at which the running sum of a row exceeds uniform * its sum: int64 [R].

    weights float32 [R, V], at least 0; uniform [R] in [0, 1). Two levels, blocks and then the ids
    of one block, need one cheap pass over the vocabulary, and a running sum over few.
    """
    num_rows, vocab_size = weights.shape
    whole = vocab_size // _SUM_BLOCK * _SUM_BLOCK
    sums = weights[:, :whole].view(num_rows, -1, _SUM_BLOCK).sum(-1, dtype=torch.float64)
    rest = weights[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)
    running = torch.cat((sums, rest), dim=-1).cumsum_(-1)
    target = uniform.double().unsqueeze(-1) * running[:, -1:]
    block = _first_above(running, target)
    before = running.gather(-1, block) - torch.cat((sums, rest), dim=-1).gather(-1, block)
    ids = block * _SUM_BLOCK + torch.arange(_SUM_BLOCK, device=weights.device)
    inner = weights.gather(-1, ids.clamp_max(vocab_size - 1)).double()
    inner.masked_fill_(ids >= vocab_size, 0.0)
    position = _first_above(before + inner.cumsum(-1), target)
    # The two levels round differently: never step onto a token that has no weight.
    position = torch.minimum(position, _last_positive(inner))
    return ids.gather(-1, position).clamp_max_(vocab_size - 1).squeeze(-1)


def _first_above(running: Tensor, target: Tensor) -> Tensor:
    """The first index of each row of `running` [R, n] that exceeds target [R, 1]: int64 [R, 1]."""
    return torch.searchsorted(running, target, right=True).clamp_max_(running.shape[-1] - 1)


def _last_positive(weights: Tensor) -> Tensor:
    """The last index of each row with a positive weight; 0 if there is none: int64 [R, 1]."""
    index = torch.arange(weights.shape[-1], device=weights.device)
    return (index * (weights > 0)).amax(-1, keepdim=True)


def top_ids(logits: Tensor, num_top: int) -> Tensor:
    """The ids of the largest logits of each row, best first, ties by lowest id: int64 [R, n].

    Torch's topk promises nothing about ties, so it gets keys that have none: the logit in the upper
    half, the id, negated, in the lower.
    """
    num_top = min(num_top, logits.shape[-1])
    if num_top == 0:
        return torch.empty((logits.shape[0], 0), dtype=torch.int64, device=logits.device)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    keys = (_ordered_bits(logits) << 32) - ids
    best = keys.topk(num_top, dim=-1).values
    return -best & 0xFFFFFFFF


def _ordered_bits(x: Tensor) -> Tensor:
    """int64 numbers in the same order as the float32 `x`; both zeros are one."""
    bits = (x.float() + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
