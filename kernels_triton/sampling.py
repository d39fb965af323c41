"""Choosing tokens without sorting a vocabulary, and log-probabilities.

A row's probabilities are kept as integers, exp(logit / temperature - maximum) in units of 2^-42:
integer sums do not depend on their order, so a token depends neither on the tile size nor on the
device. What is below one unit together weighs less than 2^-42 a token.

top-k and top-p look for the smallest logit that they keep, digit by digit of its ordered bits, in
32 / BITS passes over the row; a sort of 150 000 logits would be far more. Then one pass finds the
sum that is left and one the token at which the running sum passes uniform * sum.
Source: for the search, Alabi et al. 2012 (radix selection).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.functions import ordered_key
from quire.kernels_triton.launch import Launcher

UNIT = tl.constexpr(4398046511104.0)  # 2^42: 2^20 tokens of the largest weight fit into int64
NO_ID = tl.constexpr(0x7FFFFFFF)
LOWEST_KEY = tl.constexpr(-0x80000000)


@triton.jit
def _maximum(logits_ptr, vocab_size, BLOCK: tl.constexpr):
    """The largest logit of a row and the lowest id that has it."""
    best = tl.full([], float("-inf"), tl.float32)
    best_id = tl.full([], 0, tl.int32)
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        largest = tl.max(x, 0)
        first = tl.min(tl.where((x == largest) & (ids < vocab_size), ids, NO_ID), 0)
        best_id = tl.where(largest > best, first, best_id)
        best = tl.maximum(best, largest)
    return best, best_id


@triton.jit
def _weigh(logits_ptr, ids, vocab_size, maximum, rate):
    """Keys int32, weights int64 and weights float32 of some tokens; 0 past the vocabulary."""
    mask = ids < vocab_size
    x = tl.load(logits_ptr + ids, mask=mask, other=float("-inf"))
    size = tl.exp2((x - maximum) * rate)
    size = tl.where(mask & (x > float("-inf")), size, 0.0)
    return ordered_key(x), (size * UNIT).to(tl.int64), size


@triton.jit
def _find_key(
    logits_ptr,
    vocab_size,
    maximum,
    rate,
    wanted,
    lowest,
    COUNTS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key such that the tokens from it up weigh, or are, at least `wanted` (int64).

    Only tokens from key `lowest` up are looked at.
    """
    DIGITS: tl.constexpr = 1 << BITS
    prefix = tl.full([], 0, tl.int64)
    digits = tl.arange(0, DIGITS).to(tl.int64)
    for number in range(32 // BITS):
        shift = 32 - BITS * (number + 1)
        borders = (prefix + (digits << shift) - 2147483648).to(tl.int32)
        sums = tl.zeros([DIGITS], tl.int64)
        for begin in range(0, vocab_size, BLOCK):
            ids = begin + tl.arange(0, BLOCK)
            key, weight, _ = _weigh(logits_ptr, ids, vocab_size, maximum, rate)
            if COUNTS:
                weight = tl.where(ids < vocab_size, 1, 0).to(tl.int64)
            weight = tl.where(key >= lowest, weight, 0)
            is_above = key[:, None] >= borders[None, :]
            sums += tl.sum(tl.where(is_above, weight[:, None], 0), 0)
        digit = tl.max(tl.where(sums >= wanted, digits, 0), 0)
        prefix = prefix + (digit << shift)
    return (prefix - 2147483648).to(tl.int32)


@triton.jit
def _sum_from(logits_ptr, vocab_size, maximum, rate, lowest, above, BLOCK: tl.constexpr):
    """Weights of all tokens with key >= lowest, of those > above, and of one token at `above`."""
    total = tl.full([], 0, tl.int64)
    higher = tl.full([], 0, tl.int64)
    at = tl.full([], 0, tl.int64)
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        key, weight, _ = _weigh(logits_ptr, ids, vocab_size, maximum, rate)
        weight = tl.where(key >= lowest, weight, 0)
        total += tl.sum(weight, 0)
        higher += tl.sum(tl.where(key > above, weight, 0), 0)
        at = tl.maximum(at, tl.max(tl.where(key == above, weight, 0), 0))
    return total, higher, at


@triton.jit
def _share(total, fraction):
    """floor(total * fraction) for int64 total and float32 fraction in [0, 1), without float64."""
    part = (fraction * 2147483648.0).to(tl.int64)
    return (total >> 31) * part + (((total & 0x7FFFFFFF) * part) >> 31)


@triton.jit
def _kept(
    logits_ptr,
    ids,
    vocab_size,
    maximum,
    rate,
    lowest,
    num_ties,
    ties_before,
    min_p,
):
    """Weights int64 of the tokens that the filters leave, and how many ties they hold.

    Of the tokens at key `lowest` the first `num_ties` in the order of ids stay.
    """
    key, weight, size = _weigh(logits_ptr, ids, vocab_size, maximum, rate)
    is_tie = (key == lowest) & (ids < vocab_size)
    rank = ties_before + tl.cumsum(is_tie.to(tl.int32), 0)
    is_kept = (key > lowest) | (is_tie & (rank <= num_ties))
    weight = tl.where(is_kept & (size >= min_p), weight, 0)
    return weight, tl.sum(is_tie.to(tl.int32), 0)


@triton.jit
def sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    out_ptr,
    vocab_size,
    logits_stride,
    HAS_FILTER: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: the token that `Ops.sample` describes."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    maximum, best_id = _maximum(logits_ptr, vocab_size, BLOCK)
    if temperature == 0:
        tl.store(out_ptr + row, best_id.to(tl.int64))
        return
    rate = 1.4426950408889634 / temperature
    lowest = tl.full([], LOWEST_KEY, tl.int32)
    num_ties = tl.full([], NO_ID, tl.int32)
    min_p = tl.full([], 0.0, tl.float32)
    if HAS_FILTER:
        min_p = tl.load(min_p_ptr + row)
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        if top_k < vocab_size:
            wanted = tl.maximum(top_k, 1)
            lowest = _find_key(
                logits_ptr, vocab_size, maximum, rate, wanted, lowest, True, BITS, BLOCK
            )
        if top_p < 1:
            top = tl.full([], NO_ID, tl.int32)
            total, _, _ = _sum_from(logits_ptr, vocab_size, maximum, rate, lowest, top, BLOCK)
            limit = tl.maximum(_share(total, top_p), 1)
            lowest = _find_key(
                logits_ptr, vocab_size, maximum, rate, limit, lowest, False, BITS, BLOCK
            )
            _, higher, at = _sum_from(logits_ptr, vocab_size, maximum, rate, lowest, lowest, BLOCK)
            at = tl.maximum(at, 1)
            needed = (limit - higher + at - 1) // at
            num_ties = tl.minimum(needed, NO_ID).to(tl.int32)
    total = tl.full([], 0, tl.int64)
    ties = tl.full([], 0, tl.int32)
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        weight, num = _kept(
            logits_ptr, ids, vocab_size, maximum, rate, lowest, num_ties, ties, min_p
        )
        total += tl.sum(weight, 0)
        ties += num
    target = _share(total, tl.load(uniform_ptr + row))
    running = tl.full([], 0, tl.int64)
    ties = tl.full([], 0, tl.int32)
    chosen = tl.full([], NO_ID, tl.int32)
    begin = tl.full([], 0, tl.int32)
    while (begin < vocab_size) & (chosen == NO_ID):
        ids = begin + tl.arange(0, BLOCK)
        weight, num = _kept(
            logits_ptr, ids, vocab_size, maximum, rate, lowest, num_ties, ties, min_p
        )
        sums = running + tl.cumsum(weight, 0)
        chosen = tl.min(tl.where(sums > target, ids, NO_ID), 0)
        running += tl.sum(weight, 0)
        ties += num
        begin += BLOCK
    # Logits without a number (NaN) have no sum: then the row gets its largest, as a greedy one.
    chosen = tl.where(chosen == NO_ID, best_id, chosen)
    tl.store(out_ptr + row, chosen.to(tl.int64))


def sample(
    launcher: Launcher,
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    has_filter: bool,
    out: Tensor,
) -> None:
    """One token a row of logits float32 [R, V] (dense rows) into out int64 [R].

    temperature, top_p, min_p, uniform float32 [R]; top_k int64 [R]; V <= 2^20. Mutates out alone.
    Source: Fan et al. 2018 (top-k), Holtzman et al. 2019 (top-p), Nguyen et al. 2024 (min-p).
    """
    num_rows, vocab_size = logits.shape
    entry = launcher.find("sample")
    launcher.start(
        sample_kernel,
        (num_rows,),
        [logits, temperature, top_k, top_p, min_p, uniform, out, vocab_size, logits.stride(0)],
        {"HAS_FILTER": has_filter, **entry.constants},
        entry,
    )


@triton.jit
def logprobs_kernel(
    logits_ptr,
    tokens_ptr,
    selected_ptr,
    ranks_ptr,
    normalizer_ptr,
    vocab_size,
    logits_stride,
    BLOCK: tl.constexpr,
):
    """One row: log softmax at its token, that token's rank, and the maximum and log of the sum."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    chosen = tl.load(logits_ptr + tl.load(tokens_ptr + row))
    maximum, _ = _maximum(logits_ptr, vocab_size, BLOCK)
    total = tl.full([], 0.0, tl.float32)
    rank = tl.full([], 1, tl.int32)
    for begin in range(0, vocab_size, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        total += tl.sum(tl.exp(x - maximum), 0)
        rank += tl.sum((x > chosen).to(tl.int32), 0)
    log_total = tl.log(total)
    tl.store(selected_ptr + row, chosen - maximum - log_total)
    tl.store(ranks_ptr + row, rank.to(tl.int64))
    tl.store(normalizer_ptr + row * 2, maximum)
    tl.store(normalizer_ptr + row * 2 + 1, log_total)


def logprobs(
    launcher: Launcher, logits: Tensor, token_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities for logits float32 [R, V] (dense rows) and token_ids int64 [R].

    Returns (log softmax at the tokens float32 [R], their ranks int64 [R], [R, 2] of each row's
    maximum and the logarithm of its sum: any other entry is x - maximum - log of the sum).
    """
    num_rows, vocab_size = logits.shape
    selected = logits.new_empty(num_rows)
    ranks = token_ids.new_empty(num_rows)
    normalizer = logits.new_empty((num_rows, 2))
    entry = launcher.find("logprobs")
    launcher.start(
        logprobs_kernel,
        (num_rows,),
        [logits, token_ids, selected, ranks, normalizer, vocab_size, logits.stride(0)],
        dict(entry.constants),
        entry,
    )
    return selected, ranks, normalizer
