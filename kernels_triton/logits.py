"""What changes logits before a token is chosen: penalties, biases, and lists of what is allowed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quire.kernels_triton.launch import Launcher, ceil_div


@triton.jit
def penalties_kernel(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    counts_ptr,
    settings_ptr,
    num_entries,
    logits_stride,
    BLOCK: tl.constexpr,
):
    """BLOCK entries (row, token) of `apply_penalties`."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < num_entries
    row = tl.load(rows_ptr + entry, mask=mask, other=0)
    place = logits_ptr + row * logits_stride + tl.load(tokens_ptr + entry, mask=mask, other=0)
    count = tl.load(counts_ptr + entry, mask=mask, other=0.0)
    repetition = tl.load(settings_ptr + row * 3, mask=mask, other=1.0)
    frequency = tl.load(settings_ptr + row * 3 + 1, mask=mask, other=0.0)
    presence = tl.load(settings_ptr + row * 3 + 2, mask=mask, other=0.0)
    logit = tl.load(place, mask=mask, other=0.0)
    logit = tl.where(logit > 0, logit / repetition, logit * repetition)
    logit = logit - frequency * count - tl.where(count > 0, presence, 0.0)
    tl.store(place, logit, mask=mask)


def apply_penalties(
    launcher: Launcher,
    logits: Tensor,
    rows: Tensor,
    token_ids: Tensor,
    output_counts: Tensor,
    settings: Tensor,
) -> None:
    """Penalises M distinct entries (rows, token_ids) int64 [M] of logits float32 [R, V], in place.

    output_counts float32 [M]; settings float32 [R, 3] contiguous: (repetition, frequency,
    presence). Source: Keskar et al. 2019, section 4.1.
    """
    entry = launcher.find("entries")
    block = entry.constants["BLOCK"]
    launcher.start(
        penalties_kernel,
        (ceil_div(len(rows), block),),
        [logits, rows, token_ids, output_counts, settings, len(rows), logits.stride(0)],
        {"BLOCK": block},
        entry,
    )


@triton.jit
def move_entries_kernel(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    values_ptr,
    num_entries,
    logits_stride,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK entries: 0 fetches them into values, 1 puts values there, 2 adds values to them."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = entry < num_entries
    row = tl.load(rows_ptr + entry, mask=mask, other=0)
    place = logits_ptr + row * logits_stride + tl.load(tokens_ptr + entry, mask=mask, other=0)
    if MODE == 0:
        tl.store(values_ptr + entry, tl.load(place, mask=mask, other=0.0), mask=mask)
    else:
        value = tl.load(values_ptr + entry, mask=mask, other=0.0)
        if MODE == 2:
            value += tl.load(place, mask=mask, other=0.0)
        tl.store(place, value, mask=mask)


def _move(
    launcher: Launcher, logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor, mode: int
) -> None:
    entry = launcher.find("entries")
    block = entry.constants["BLOCK"]
    launcher.start(
        move_entries_kernel,
        (ceil_div(len(rows), block),),
        [logits, rows, token_ids, values, len(rows), logits.stride(0)],
        {"MODE": mode, "BLOCK": block},
        entry,
    )


def add_bias(
    launcher: Launcher, logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor
) -> None:
    """logits[rows, token_ids] += bias for M distinct entries, in place. logits float32 [R, V]."""
    _move(launcher, logits, rows, token_ids, bias, 2)


@triton.jit
def fill_rows_kernel(logits_ptr, rows_ptr, vocab_size, logits_stride, BLOCK: tl.constexpr):
    """Sets -inf in a piece of one of `rows`."""
    row = tl.load(rows_ptr + tl.program_id(0))
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    nothing = tl.full([BLOCK], float("-inf"), tl.float32)
    tl.store(logits_ptr + row * logits_stride + column, nothing, mask=column < vocab_size)


def keep_only(
    launcher: Launcher, logits: Tensor, rows: Tensor, row_of_entry: Tensor, token_ids: Tensor
) -> None:
    """-inf everywhere in `rows` int64 [K] but at (row_of_entry, token_ids) int64 [M], in place."""
    kept = logits.new_empty(len(row_of_entry))
    _move(launcher, logits, row_of_entry, token_ids, kept, 0)
    entry = launcher.find("rows_of_logits")
    block = entry.constants["BLOCK"]
    vocab_size = logits.shape[1]
    launcher.start(
        fill_rows_kernel,
        (len(rows), ceil_div(vocab_size, block)),
        [logits, rows, vocab_size, logits.stride(0)],
        {"BLOCK": block},
        entry,
    )
    _move(launcher, logits, row_of_entry, token_ids, kept, 1)


@triton.jit
def token_mask_kernel(
    logits_ptr, rows_ptr, mask_ptr, vocab_size, logits_stride, mask_stride, BLOCK: tl.constexpr
):
    """Sets -inf in a piece of one row where the row's bit mask has no bit."""
    number = tl.program_id(0)
    row = tl.load(rows_ptr + number)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_token = column < vocab_size
    words = tl.load(mask_ptr + number * mask_stride + column // 32, mask=is_token, other=-1)
    is_forbidden = ((words >> (column % 32)) & 1) == 0
    nothing = tl.full([BLOCK], float("-inf"), tl.float32)
    tl.store(logits_ptr + row * logits_stride + column, nothing, mask=is_token & is_forbidden)


def apply_token_mask(launcher: Launcher, logits: Tensor, rows: Tensor, mask: Tensor) -> None:
    """-inf in logits[rows[i]] where mask int32 [K, ceil(V / 32)] has no bit for a token, in place.

    Bit t % 32 of word t // 32 is token t's.
    """
    entry = launcher.find("rows_of_logits")
    block = entry.constants["BLOCK"]
    vocab_size = logits.shape[1]
    launcher.start(
        token_mask_kernel,
        (len(rows), ceil_div(vocab_size, block)),
        [logits, rows, mask, vocab_size, logits.stride(0), mask.stride(0)],
        {"BLOCK": block},
        entry,
    )
