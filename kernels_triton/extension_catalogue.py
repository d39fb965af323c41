"""The kernels of extensions in every launch that a table knows; see `catalogue`."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.kernels_triton import cache, expert_codes, experts, float8, latent, quantized, recurrence
from quire.kernels_triton.attention import AttentionShape, PagedCache, PagedStep, make_partials
from quire.kernels_triton.offline import RecordingLauncher

_BF16, _FP32, _INT32, _INT64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
_META = torch.device("meta")
_REQUESTS, _TOKENS = 8, 512
_LATENTS = {"16 latent heads": (16, 576, 512), "128 latent heads": (128, 576, 512)}
_EXPERTS = {"few": 8, "many": 2048}
"""Tokens, so that experts get a row or a tile each."""


def record_extensions(launcher: RecordingLauncher, *, fp8: torch.dtype | None = None) -> None:
    """Calls the host functions of extensions with the shapes of today's models.

    `fp8`: a dtype of caches, and of the matrix units; or none.
    """
    for name, shape in _LATENTS.items():
        launcher.label = f"{name}: "
        _record_latent(launcher, shape, _BF16)
    for narrow in (torch.int8, fp8):
        if narrow is not None:
            launcher.label = f"{narrow} latents: "
            _record_latent(launcher, _LATENTS["16 latent heads"], _BF16, narrow)
    launcher.label = "float16: "
    _record_latent(launcher, _LATENTS["16 latent heads"], torch.float16)
    _record_experts(launcher, 8, torch.float16)
    _record_quantized(launcher, 8, torch.float16)
    _record_expert_codes(launcher, 8, torch.float16, fp8)
    launcher.label = "float32: "
    _record_latent(launcher, _LATENTS["16 latent heads"], _FP32)
    _record_experts(launcher, 8, _FP32)
    _record_quantized(launcher, 8, _FP32)
    _record_expert_codes(launcher, 8, _FP32, fp8)
    for name, num_tokens in _EXPERTS.items():
        launcher.label = f"{name} tokens: "
        _record_experts(launcher, num_tokens, _BF16)
        _record_quantized(launcher, num_tokens, _BF16)
        _record_float8(launcher, num_tokens, _BF16, fp8)
        _record_expert_codes(launcher, num_tokens, _BF16, fp8)
    for dtype in (torch.float16, _FP32):
        launcher.label = f"{str(dtype).removeprefix('torch.')}: "
        _record_float8(launcher, 8, dtype, fp8)
    _record_variants(launcher)
    launcher.label = ""
    places = _empty(_REQUESTS, dtype=_INT64)
    _record_recurrence(launcher, None)
    _record_recurrence(launcher, (places, places))


def _empty(*shape: int, dtype: torch.dtype = _BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _record_latent(
    launcher: RecordingLauncher,
    numbers: tuple[int, int, int],
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> None:
    heads, size, rank = numbers
    shape = AttentionShape(
        num_heads=heads,
        num_kv_heads=1,
        head_size=size,
        v_head_size=rank,
        block_size=64,
        scale=0.1,
    )
    latents = _empty(1024, 64, 1, size, dtype=cache_dtype or dtype)
    scale = _empty(1024, 64, 1, dtype=_FP32) if cache_dtype == torch.int8 else None
    paged = PagedCache(k=latents, v=latents, k_scale=scale, v_scale=scale)
    k = _empty(_TOKENS, 1, size, dtype=dtype)
    cache.write_cache(launcher, k, k, paged, _empty(_TOKENS, dtype=_INT64))
    q, out = (_empty(_TOKENS, heads, n, dtype=dtype) for n in (size, rank))
    for splits in (1, 8):
        partial, partial_log = make_partials(
            shape, num_requests=_REQUESTS, num_splits=splits, device=_META
        )
        step = PagedStep(
            query_start_loc=_empty(_REQUESTS + 1, dtype=_INT32),
            seq_lens=_empty(_REQUESTS, dtype=_INT32),
            block_table=_empty(_REQUESTS, 512, dtype=_INT32),
            num_tokens=_TOKENS,
            has_decodes=True,
            has_prefills=splits == 1,
            num_splits=splits,
            partial=partial,
            partial_log=partial_log,
        )
        latent.latent_attention(launcher, shape, step, q, paged, out)


def _record_experts(
    launcher: RecordingLauncher,
    num_tokens: int,
    dtype: torch.dtype,
    activation: str = "silu",
    *,
    is_special: bool = False,
) -> None:
    """`is_special`: with biases, and weights that scale the inputs."""
    for count, groups, is_sigmoid in ((8, 1, False), (256, 8, True)):
        weights, ids = _route(launcher, num_tokens, count, groups, is_sigmoid=is_sigmoid)
        layer = experts.Experts(
            gate_up=_empty(count, 2 * 1408, 2048, dtype=dtype),
            down=_empty(count, 2048, 1408, dtype=dtype),
            gate_up_bias=_empty(count, 2 * 1408, dtype=dtype) if is_special else None,
            down_bias=_empty(count, 2048, dtype=dtype) if is_special else None,
            activation=activation,
            alpha=1.702,
            limit=7.0,
        )
        x = _empty(num_tokens, 2048, dtype=dtype)
        experts.run_experts(launcher, x, layer, weights, ids, weighs_input=is_special)


def _route(
    launcher: RecordingLauncher, num_tokens: int, count: int, groups: int, *, is_sigmoid: bool
) -> tuple[Tensor, Tensor]:
    routing = experts.Routing(
        num_experts=count,
        num_chosen=min(8, count // 4),
        is_sigmoid=is_sigmoid,
        is_renormalised=is_sigmoid,
        scale=2.5,
        num_groups=groups,
        num_kept_groups=max(1, groups // 2),
        sums_two=groups > 1 and is_sigmoid,
    )
    bias = _empty(count, dtype=_FP32) if is_sigmoid else None
    return experts.route(launcher, _empty(num_tokens, count, dtype=_FP32), routing, bias)


def _record_variants(launcher: RecordingLauncher) -> None:
    """What switches of kernels turn on that no model above has: loops are compiled by type."""
    for activation in experts.ACTIVATIONS:
        launcher.label = f"{activation}, biases: "
        _record_experts(launcher, 8, _BF16, activation, is_special=True)
    launcher.label = "softmax in groups: "
    _route(launcher, _TOKENS, 160, 8, is_sigmoid=False)
    launcher.label = "int8 zeros: "
    layer = quantized.QuantizedLayer(
        bits=8,
        group_size=64,
        num_groups=64,
        num_inputs=4096,
        codes=_empty(4096, 4096, dtype=torch.uint8),
        scales=_empty(4096, 64),
        zeros=_empty(4096, 64, dtype=torch.uint8),
        bias=_empty(4096),
        activations="token",
    )
    for num_tokens in (8, _TOKENS):
        quantized.quantized_linear(launcher, _empty(num_tokens, 4096), layer)


def _record_quantized(launcher: RecordingLauncher, num_tokens: int, dtype: torch.dtype) -> None:
    for bits, size, activations in ((8, 0, "token"), (4, 128, "none"), (4, 128, "group")):
        layer = quantized.QuantizedLayer(
            bits=bits,
            group_size=size or 4096,
            num_groups=4096 // size if size else 1,
            num_inputs=4096,
            codes=_empty(4096, 4096 * bits // 8, dtype=torch.uint8),
            scales=_empty(4096, 4096 // size if size else 1),
            zeros=_empty(4096, 32, dtype=torch.uint8) if activations == "none" else None,
            bias=None,
            activations=activations,
        )
        before = launcher.label
        launcher.label = f"{before}int{bits} {activations}: "
        quantized.quantized_linear(launcher, _empty(num_tokens, 4096, dtype=dtype), layer)
        launcher.label = before


def _record_float8(
    launcher: RecordingLauncher, num_tokens: int, dtype: torch.dtype, fp8: torch.dtype | None
) -> None:
    """By rows and by groups with rounded inputs, in the units if there are any, and as they are."""
    units = "" if fp8 is None else str(fp8).removeprefix("torch.")
    before = launcher.label
    for groups, activations in ((1, "token"), (32, "group"), (32, "none")):
        layer = float8.pack_float8(
            _empty(4096, 4096, dtype=torch.uint8),
            _empty(4096, groups, dtype=_FP32),
            _empty(4096, dtype=dtype) if groups == 1 else None,
            group_size=4096 // groups,
            activations=activations,
            units=units,
        )
        launcher.label = f"{before}fp8 {activations}: "
        float8.float8_linear(launcher, _empty(num_tokens, 4096, dtype=dtype), layer)
    launcher.label = before


def _record_expert_codes(
    launcher: RecordingLauncher, num_tokens: int, dtype: torch.dtype, fp8: torch.dtype | None
) -> None:
    """Experts in codes of the forms that `_record_quantized` and `_record_float8` have."""
    units = "" if fp8 is None else str(fp8).removeprefix("torch.")
    before, count = launcher.label, 8
    weights, ids = _empty(num_tokens, 2, dtype=_FP32), _empty(num_tokens, 2, dtype=_INT64)
    forms = [(8, 0, "token", ""), (4, 128, "none", ""), (4, 128, "group", "")]
    forms += [(8, 0, "token", units or "as they are"), (8, 128, "group", units or "as they are")]
    # One form of whole numbers and one of floats is enough where the dtype is not a model's own.
    for bits, size, activations, floats in forms if dtype == _BF16 else forms[1::3]:
        up, down = (
            expert_codes.ExpertSide(
                bits=bits,
                is_float8=bool(floats),
                units=units if floats else "",
                group_size=size or num_inputs,
                num_groups=num_inputs // size if size else 1,
                codes=_empty(count, num_outputs, num_inputs * bits // 8, dtype=torch.uint8),
                scales=_empty(count, num_outputs, num_inputs // size if size else 1),
                zeros=_empty(count, num_outputs, num_inputs // size, dtype=torch.uint8)
                if activations == "none"
                else None,
                bias=None,
                activations=activations,
            )
            for num_outputs, num_inputs in ((2 * 1408, 2048), (2048, 1408))
        )
        layer = expert_codes.ExpertCodes(
            gate_up=up, down=down, activation="silu", alpha=1.702, limit=7.0
        )
        launcher.label = f"{before}{'fp8' if floats else f'int{bits}'} {activations}: "
        x = _empty(num_tokens, 2048, dtype=dtype)
        expert_codes.run_expert_codes(launcher, x, layer, weights, ids, weighs_input=False)
    launcher.label = before


def _record_recurrence(launcher: RecordingLauncher, slots: recurrence.Slots | None) -> None:
    before = "" if slots is None else "in pages: "
    launcher.label = before
    starts = _empty(_REQUESTS + 1, dtype=_INT32)
    x = _empty(_TOKENS, 4096)
    recurrence.causal_conv1d(
        *(launcher, x, _empty(4096, 4), None, _empty(_REQUESTS, 4096, 3), starts),
        has_silu=True,
        slots=slots,
    )
    bias, states = _empty(4096), _empty(_REQUESTS, 4096, 1)
    launcher.label = f"{before}width 2, bias: "
    recurrence.causal_conv1d(
        launcher, x, _empty(4096, 2), bias, states, starts, has_silu=False, slots=slots
    )
    launcher.label = before
    dt, a = _empty(_TOKENS, 4096, dtype=_FP32), _empty(4096, 16, dtype=_FP32)
    b, states = _empty(_TOKENS, 16), _empty(_REQUESTS, 4096, 16, dtype=_FP32)
    recurrence.selective_scan(launcher, x, dt, a, b, b, a[:, 0], states, starts, slots)
    heads, a = _empty(_TOKENS, 64, 64), _empty(64, dtype=_FP32)
    states = _empty(_REQUESTS, 64, 64, 128, dtype=_FP32)
    dt, b = _empty(_TOKENS, 64, dtype=_FP32), _empty(_TOKENS, 1, 128)
    recurrence.ssd_scan(launcher, heads, dt, a, b, b, a, states, starts, slots)
    q, v = _empty(_TOKENS, 16, 128), _empty(_TOKENS, 32, 128)
    states, decay = _empty(_REQUESTS, 32, 128, 128, dtype=_FP32), _empty(_TOKENS, 32, dtype=_FP32)
    recurrence.gated_delta_rule(launcher, q, q, v, decay, decay, states, starts, slots)
    launcher.label = ""
