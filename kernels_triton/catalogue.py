"""Every kernel in every launch that a table knows, on tensors without memory.

What is called here is what gets compiled ahead of time for devices that are not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from quire.kernels_triton import cache, elementwise, logits, norms, sampling
from quire.kernels_triton.attention import (
    AttentionShape,
    PagedCache,
    PagedStep,
    choose_splits,
    make_partials,
    paged_attention,
)
from quire.kernels_triton.extension_catalogue import record_extensions
from quire.kernels_triton.offline import RecordingLauncher

_BF16, _FP32, _INT32, _INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
_META = torch.device("meta")
_SHAPES = (
    # heads, key heads, head size, size of values
    (8, 8, 64, 64),
    (14, 2, 64, 64),
    (32, 8, 128, 128),
    (64, 8, 80, 80),
    (16, 16, 192, 128),
    (16, 8, 256, 256),
)
_VARIANTS = {
    "window": {"window": 4096},
    "chunk": {"chunk": 8192},
    "cap": {"soft_cap": 50.0},
}
_REQUESTS, _TOKENS, _WIDTHS = 8, 512, (1024, 4096, 16384)


def record_all(launcher: RecordingLauncher, *, fp8: torch.dtype | None = None) -> None:
    """Calls every host function with the shapes of today's models. `fp8`: a cache dtype, or none.

    Mutates the launcher's notes alone.
    """
    choose_splits(launcher, num_requests=1, num_kv_heads=8, max_seq_len=8192)
    _record_attention(launcher, fp8)
    record_extensions(launcher, fp8=fp8)
    _record_layers(launcher)
    _record_logits(launcher)


@contextmanager
def _labelled(launcher: RecordingLauncher, label: str) -> Iterator[None]:
    launcher.label, before = f"{label}: ", launcher.label
    try:
        yield
    finally:
        launcher.label = before


def _empty(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _record_attention(launcher: RecordingLauncher, fp8: torch.dtype | None) -> None:
    for numbers in _SHAPES:
        shape = _shape(*numbers)
        with _labelled(launcher, f"{numbers[0]}/{numbers[1]} heads of {numbers[2]}"):
            _attend(launcher, shape)
    plain = _shape(*_SHAPES[2])
    for name, changes in _VARIANTS.items():
        with _labelled(launcher, name):
            _attend(launcher, replace(plain, **changes), splits=(8,))
    with _labelled(launcher, "sinks"):
        _attend(launcher, plain, splits=(8,), extras=("sinks",))
    with _labelled(launcher, "alibi"):
        _attend(launcher, plain, splits=(8,), extras=("alibi_slopes",))
    with _labelled(launcher, "all of them"):
        every = replace(plain, window=4096, soft_cap=50.0)
        _attend(launcher, every, splits=(8,), extras=("sinks", "alibi_slopes"))
    with _labelled(launcher, "float16"):
        _attend(launcher, plain, dtype=torch.float16, splits=(8,))
    with _labelled(launcher, "float32"):
        _attend(launcher, _shape(*_SHAPES[0]), dtype=_FP32, splits=(8,))
    for narrow in (fp8, torch.int8):
        if narrow is not None:
            with _labelled(launcher, str(narrow)):
                _attend(launcher, plain, splits=(8,), cache_dtype=narrow)


def _shape(num_heads: int, num_kv_heads: int, head_size: int, v_head_size: int) -> AttentionShape:
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        v_head_size=v_head_size,
        block_size=16,
        scale=head_size**-0.5,
    )


def _attend(
    launcher: RecordingLauncher,
    shape: AttentionShape,
    *,
    dtype: torch.dtype = _BF16,
    cache_dtype: torch.dtype | None = None,
    splits: tuple[int, ...] = (1, 8),
    extras: tuple[str, ...] = (),
) -> None:
    paged = _cache(shape, cache_dtype or dtype, has_scales=cache_dtype == torch.int8)
    q = _empty(_TOKENS, shape.num_heads, shape.head_size, dtype=dtype)
    k = _empty(_TOKENS, shape.num_kv_heads, shape.head_size, dtype=dtype)
    v = _empty(_TOKENS, shape.num_kv_heads, shape.v_head_size, dtype=dtype)
    out = _empty(_TOKENS, shape.num_heads, shape.v_head_size, dtype=dtype)
    cache.write_cache(launcher, k, v, paged, _empty(_TOKENS, dtype=_INT64))
    more = {name: _empty(shape.num_heads, dtype=_FP32) for name in extras}
    for num_splits in splits:
        partial, partial_log = make_partials(
            shape, num_requests=_REQUESTS, num_splits=num_splits, device=_META
        )
        step = PagedStep(
            query_start_loc=_empty(_REQUESTS + 1, dtype=_INT32),
            seq_lens=_empty(_REQUESTS, dtype=_INT32),
            block_table=_empty(_REQUESTS, 512, dtype=_INT32),
            num_tokens=_TOKENS,
            has_decodes=True,
            has_prefills=num_splits == splits[0],
            num_splits=num_splits,
            partial=partial,
            partial_log=partial_log,
        )
        paged_attention(launcher, shape, step, q, paged, out, **more)


def _cache(shape: AttentionShape, dtype: torch.dtype, *, has_scales: bool) -> PagedCache:
    place = (1024, shape.block_size, shape.num_kv_heads)
    scale = _empty(*place, dtype=_FP32) if has_scales else None
    return PagedCache(
        k=_empty(*place, shape.head_size, dtype=dtype),
        v=_empty(*place, shape.v_head_size, dtype=dtype),
        k_scale=scale,
        v_scale=scale,
    )


def _record_layers(launcher: RecordingLauncher) -> None:
    for width in (*_WIDTHS, 128):
        with _labelled(launcher, f"width {width}"):
            x, weight = _empty(_TOKENS, width), _empty(width)
            norms.rms_norm(launcher, x, weight, 1e-6, x)
            norms.add_rms_norm(launcher, x, x, weight, 1e-6, x)
    x, out = _empty(_TOKENS, 2 * 14336), _empty(_TOKENS, 14336)
    for kind in elementwise.ACTIVATIONS:
        with _labelled(launcher, kind):
            elementwise.gated_activation(launcher, x, kind, out)
    q, k = _empty(_TOKENS, 32, 128), _empty(_TOKENS, 8, 128)
    angles = _empty(_TOKENS, 64, dtype=_FP32)
    for is_interleaved in (False, True):
        elementwise.rotary(launcher, q, k, angles, angles, is_interleaved=is_interleaved)
    elementwise.soft_cap(launcher, _empty(_REQUESTS, 32000, dtype=_FP32), 30.0)
    blocks = _empty(_REQUESTS, dtype=_INT64)
    cache.copy_blocks(launcher, _empty(1024, 16, 8, 128), blocks, blocks)


def _record_logits(launcher: RecordingLauncher) -> None:
    table = _empty(_REQUESTS, 128256, dtype=_FP32)
    ids, row = _empty(_REQUESTS, dtype=_INT64), _empty(_REQUESTS, dtype=_FP32)
    settings = _empty(_REQUESTS, 3, dtype=_FP32)
    logits.apply_penalties(launcher, table, ids, ids, row, settings)
    logits.add_bias(launcher, table, ids, ids, row)
    logits.keep_only(launcher, table, ids, ids, ids)
    logits.apply_token_mask(launcher, table, ids, _empty(_REQUESTS, 4008, dtype=_INT32))
    for has_filter in (False, True):
        sampling.sample(
            launcher,
            table,
            temperature=row,
            top_k=ids,
            top_p=row,
            min_p=row,
            uniform=row,
            has_filter=has_filter,
            out=ids,
        )
    sampling.logprobs(launcher, table, ids)
