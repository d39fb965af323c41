"""Experts and recurrences by the compiled kernels: which calls they take, and how tensors go in."""

from __future__ import annotations

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu import native_linear
from quire.core.interface import (
    ExpertWeights,
    PackedExperts,
    QuantizedExperts,
    RoutingSpec,
    Sequences,
)

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""What the kernels compute from and to."""


def takes(*tensors: Tensor | None) -> bool:
    """Whether all that are given are of a dtype of the kernels."""
    return kernels_cpu.HAVE_NATIVE and all(t is None or t.dtype in DTYPES for t in tensors)


# --- experts --------------------------------------------------------------------------------------


def route(
    logits: Tensor, spec: RoutingSpec, correction_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`Ops.route_experts` for scores that the kernels know."""
    shape = (logits.shape[0], spec.num_chosen)
    weights = logits.new_empty(shape, dtype=torch.float32)
    expert_ids = logits.new_empty(shape, dtype=torch.int64)
    kernels_cpu.route_experts(
        logits if logits.dtype == torch.float32 else logits.float(),
        None if correction_bias is None else correction_bias.float().contiguous(),
        weights,
        expert_ids,
        is_sigmoid=spec.score == "sigmoid",
        is_renormalised=spec.is_renormalised,
        scale=spec.scale,
        num_groups=spec.num_groups,
        num_kept_groups=spec.num_kept_groups,
        adds_two_best=spec.group_score == "top2",
    )
    return weights, expert_ids


def pack_experts(weights: ExpertWeights) -> PackedExperts:
    """`Ops.pack_experts`, in the order of the kernels."""
    packed = kernels_cpu.pack_experts(
        weights.gate_up,
        weights.down,
        weights.gate_up_bias,
        weights.down_bias,
        activation=weights.activation,
        alpha=weights.alpha,
        limit=weights.limit,
    )
    dtype = str(weights.gate_up.dtype).removeprefix("torch.")
    return PackedExperts(
        num_experts=packed.num_experts,
        hidden_size=packed.hidden_size,
        dtype=dtype,
        format=f"native-{dtype}",
        size_bytes=packed.size_bytes,
        payload=packed,
    )


def pack_quantized_experts(weights: QuantizedExperts, dtype: str) -> PackedExperts:
    """`Ops.pack_quantized_experts`: of each expert the linear layers that it is."""
    sides = ((weights.gate_up, weights.gate_up_bias), (weights.down, weights.down_bias))
    gate_up, down = (
        [
            native_linear.pack_codes(weight, None if biases is None else biases[expert])
            for expert, weight in enumerate(of_experts)
        ]
        for of_experts, biases in sides
    )
    packed = kernels_cpu.PackedExpertCodes(
        gate_up,
        down,
        activation=weights.activation,
        alpha=weights.alpha,
        limit=weights.limit,
    )
    return PackedExperts(
        num_experts=packed.num_experts,
        hidden_size=packed.hidden_size,
        dtype=dtype,
        format=native_linear.name_of_codes(weights.gate_up[0]),
        size_bytes=packed.size_bytes,
        payload=packed,
    )


def experts(
    x: Tensor,
    packed: kernels_cpu.PackedExpertWeights | kernels_cpu.PackedExpertCodes,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    weighs_input: bool,
) -> Tensor:
    """`Ops.experts`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    shares = weights.float().contiguous()
    packed.run(x, shares, expert_ids.contiguous(), out, weighs_input=weighs_input)
    return out


def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`Ops.head_linear`."""
    out = x.new_empty((x.shape[0], weight.shape[0], weight.shape[1]))
    is_dense = 1 in weight.stride()[1:]
    kernels_cpu.head_linear(x, weight if is_dense else weight.contiguous(), out)
    return out


# --- recurrence -----------------------------------------------------------------------------------


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    states: Tensor,
    sequences: Sequences,
    *,
    activation: str,
) -> Tensor:
    """`Ops.causal_conv1d`, all of one dtype."""
    out = _result_like(x, sequences)
    dense = _dense_states(states, sequences)
    kernels_cpu.causal_conv1d(
        x if x.stride(-1) == 1 else x.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        dense,
        sequences.starts,
        out,
        has_silu=activation == "silu",
        slots=_slots(sequences),
    )
    _put_back(states, dense)
    return out


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """`Ops.selective_scan`."""
    out = _result_like(x, sequences)
    dense = _dense_states(states, sequences)
    kernels_cpu.selective_scan(
        _dense_rows(x),
        _dense_rows(dt),
        a.contiguous(),
        _dense_rows(b),
        _dense_rows(c),
        None if d is None else d.contiguous(),
        dense,
        sequences.starts,
        out,
        slots=_slots(sequences),
    )
    _put_back(states, dense)
    return out


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """`Ops.ssd_scan`."""
    out = _result_like(x, sequences)
    dense = _dense_states(states, sequences)
    kernels_cpu.ssd_scan(
        _dense_rows(x),
        _dense_rows(dt),
        a.contiguous(),
        _dense_rows(b),
        _dense_rows(c),
        None if d is None else d.contiguous(),
        dense,
        sequences.starts,
        out,
        slots=_slots(sequences),
    )
    _put_back(states, dense)
    return out


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    states: Tensor,
    sequences: Sequences,
) -> Tensor:
    """`Ops.gated_delta_rule`."""
    out = _result_like(v, sequences)
    dense = _dense_states(states, sequences)
    kernels_cpu.gated_delta_rule(
        _dense_rows(q),
        _dense_rows(k),
        _dense_rows(v),
        _dense_rows(decay),
        _dense_rows(beta),
        dense,
        sequences.starts,
        out,
        slots=_slots(sequences),
    )
    _put_back(states, dense)
    return out


def _result_like(x: Tensor, sequences: Sequences) -> Tensor:
    """An empty result; rows that belong to no sequence are zero."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out[sequences.starts_host[-1] :] = 0
    return out


def _slots(sequences: Sequences) -> tuple[Tensor, Tensor] | None:
    return None if sequences.slots is None else (sequences.slots.sources, sequences.slots.targets)


def _dense_states(states: Tensor, sequences: Sequences) -> Tensor:
    """The same, or a dense copy; a page is taken as it lies."""
    return states if sequences.slots is not None else states.contiguous()


def _dense_rows(x: Tensor) -> Tensor:
    """The same with dense dimensions after the first."""
    is_dense = x.stride(-1) == 1 and (x.dim() < 3 or x.stride(1) == x.shape[2])
    return x if is_dense else x.contiguous()


def _put_back(states: Tensor, dense: Tensor) -> None:
    """The states into the tensor that was given, where the kernel had a copy."""
    if dense is not states:
        states.copy_(dense)
