"""Masks, sampling and log-probabilities over a large vocabulary, without a sort."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


def mask_tokens(logits: Tensor, rows: Tensor, mask: Tensor) -> None:
    """Sets -inf where a row's mask forbids a token, in place.

    logits float32 [R, V] with dense rows; rows int64 [K], distinct; mask int32 [K, ceil(V / 32)]:
    bit i % 32 of word i // 32 is set where token i is allowed. Raises: ValueError, TypeError,
    IndexError.
    """
    stride = _check_logits(logits)
    checks.check_list("rows", rows, "int64", mask.shape[0])
    checks.check_table("mask", mask)
    num_rows, vocab_size = logits.shape
    if mask.shape[1] * 32 < vocab_size:
        raise ValueError(f"a mask of {mask.shape[1]} words for {vocab_size} tokens")
    sizes = (mask.shape[0], num_rows, vocab_size, stride, mask.stride(0))
    _cpu.mask_tokens(logits.data_ptr(), rows.data_ptr(), mask.data_ptr(), sizes)


def most_likely(logits: Tensor, out: Tensor) -> None:
    """out int64 [R] = the id of the largest logit, the lowest on a tie. logits float32 [R, V]."""
    stride = _check_logits(logits)
    checks.check_list("out", out, "int64", logits.shape[0])
    sizes = (*logits.shape, stride)
    _cpu.sample(logits.data_ptr(), 0, 0, 0, 0, 0, out.data_ptr(), sizes, True, False)


def most_likely_of_any(logits: Tensor, out: Tensor, is_broken: Tensor) -> None:
    """out int64 [R] = the id of the largest logit, the lowest on a tie; 0 where there is none.

    logits [R, V] in float32, bfloat16 or float16 with dense rows; is_broken bool [R] becomes true
    where a logit is not a number or the largest is not finite. Raises: ValueError, TypeError.
    """
    native.require_native()
    num_rows, vocab_size = logits.shape
    stride = checks.check_dense("logits", logits, logits.dtype, 2)[0]
    checks.check_list("out", out, "int64", num_rows)
    checks.check_list("is_broken", is_broken, "bool", num_rows)
    if vocab_size == 0:
        raise ValueError("logits over no tokens")
    sizes = (num_rows, vocab_size, stride)
    dtype = checks.dtype_code(logits.dtype)
    _cpu.most_likely(dtype, logits.data_ptr(), out.data_ptr(), is_broken.data_ptr(), sizes)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    out: Tensor,
    *,
    needs_filter: bool,
) -> None:
    """out int64 [R] = one token a row, chosen as `Ops.sample` says. Mutates `out` alone.

    logits float32 [R, V] with dense rows; top_k int64 [R], the other settings float32 [R].
    `needs_filter` False: top_k, top_p and min_p are not read. Raises: ValueError, TypeError.
    """
    stride = _check_logits(logits)
    num_rows = logits.shape[0]
    for name, setting in (
        ("temperature", temperature),
        ("top_p", top_p),
        ("min_p", min_p),
        ("uniform", uniform),
    ):
        checks.check_list(name, setting, "float32", num_rows)
    checks.check_list("top_k", top_k, "int64", num_rows)
    checks.check_list("out", out, "int64", num_rows)
    _cpu.sample(
        logits.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        uniform.data_ptr(),
        out.data_ptr(),
        (*logits.shape, stride),
        False,
        needs_filter,
    )


def logprobs(
    logits: Tensor,
    token_ids: Tensor,
    selected: Tensor,
    ranks: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
) -> None:
    """Log-softmax at token_ids, their ranks (1 for the best, ties share), and the n best.

    logits float32 [R, V] with dense rows; token_ids int64 [R]; writes selected float32 [R], ranks
    int64 [R], top_ids int64 [R, n] (ties by lowest id) and top_logprobs float32 [R, n]. Raises:
    ValueError, TypeError, IndexError.
    """
    stride = _check_logits(logits)
    num_rows, vocab_size = logits.shape
    num_top = top_ids.shape[1]
    checks.check_list("token_ids", token_ids, "int64", num_rows)
    checks.check_list("selected", selected, "float32", num_rows)
    checks.check_list("ranks", ranks, "int64", num_rows)
    checks.check_contiguous("top_ids", top_ids, "int64", (num_rows, num_top))
    checks.check_contiguous("top_logprobs", top_logprobs, "float32", (num_rows, num_top))
    if num_top > vocab_size:
        raise ValueError(f"the best {num_top} of {vocab_size} tokens")
    _cpu.logprobs(
        logits.data_ptr(),
        token_ids.data_ptr(),
        selected.data_ptr(),
        ranks.data_ptr(),
        top_ids.data_ptr(),
        top_logprobs.data_ptr(),
        (num_rows, vocab_size, stride, num_top),
    )


def _check_logits(logits: Tensor) -> int:
    """float32 [R, V], V at least 1, on the CPU; returns the stride of its rows."""
    native.require_native()
    if str(logits.dtype) != "torch.float32":
        raise TypeError(f"logits is {logits.dtype}, expected float32")
    stride = checks.check_dense("logits", logits, logits.dtype, 2)[0]
    if logits.shape[1] == 0:
        raise ValueError("logits over no tokens")
    return stride
