"""Whole decoder layers by the compiled kernels: which layers they take, and how tensors go in.

At one token a step, the interpreter between the operators of a small model takes longer than some
of them; and the threads of the kernels fall asleep meanwhile, and must be woken.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu.attention import CpuAttention, NativePlan
from quire.core.interface import (
    AttentionBackend,
    AttentionPlan,
    DecoderLayerParts,
    FusedLayer,
    FusedLayers,
    LayerCache,
    MixtureLayerParts,
    PackedLinear,
)

_Parts = DecoderLayerParts | MixtureLayerParts

_ACTIVATIONS = frozenset({"silu", "gelu_tanh", "gelu"})


def fuse(parts: _Parts, attention: AttentionBackend) -> FusedLayer | None:
    """One call for a layer; None where an operator of it is not one of the compiled kernels."""
    if type(attention) is not CpuAttention or not attention.provider().startswith("native"):
        return None
    spec = attention.spec
    linears = [_payload(parts.qkv), _payload(parts.output)]
    mlp = _mlp_of(parts)
    is_plain = spec.kind in ("causal", "sliding_window", "chunked") and not spec.has_alibi
    is_plain = is_plain and spec.head_size == spec.v_head_size == parts.head_size
    qkv, output = linears
    if qkv is None or output is None or mlp is None or not is_plain:
        return None
    if parts.activation not in _ACTIVATIONS:
        return None
    norms = _norms(parts)
    dtype = parts.following_norm.dtype
    if any(norm is not None and norm.dtype != dtype for norm in norms):
        return None
    if spec.dtype != str(dtype).removeprefix("torch."):
        return None
    layer = kernels_cpu.FusedDecoderLayer(
        dtype,
        (qkv, output),
        mlp,
        norms,
        num_heads=parts.num_heads,
        num_kv_heads=parts.num_kv_heads,
        head_size=parts.head_size,
        num_pairs=parts.num_rotated // 2,
        gate=parts.activation,
        eps=parts.eps,
        scale=spec.scale,
        is_interleaved=parts.is_rope_interleaved,
        window=(spec.window or 0) if spec.kind == "sliding_window" else 0,
        chunk=(spec.window or 0) if spec.kind == "chunked" else 0,
        soft_cap=spec.soft_cap or 0.0,
        sinks=parts.sinks,
        is_norm_joint=parts.is_qk_norm_joint,
    )
    return FusedCpuLayer(layer)


class FusedCpuLayer:
    """A `FusedLayer` by the compiled kernels."""

    __slots__ = ("_alone", "layer")

    def __init__(self, layer: kernels_cpu.FusedDecoderLayer) -> None:
        self.layer = layer
        self._alone = FusedCpuLayers([layer], [0], [0])

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: LayerCache,
        plan: AttentionPlan,
    ) -> Tensor:
        return self._alone(x, residual, [angles], [cache], [plan])


class FusedCpuLayers:
    """`FusedLayers` by the compiled kernels."""

    __slots__ = ("_caches", "_chain")

    def __init__(
        self,
        layers: Sequence[kernels_cpu.FusedDecoderLayer],
        groups: Sequence[int],
        ropes: Sequence[int],
    ) -> None:
        self._chain = kernels_cpu.DecoderChain(layers, groups, ropes)
        self._caches: Sequence[LayerCache] = ()

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache],
        plans: Sequence[AttentionPlan],
    ) -> Tensor:
        if len(caches) != len(self._caches) or any(map(is_not, caches, self._caches)):
            self._chain.bind([_tensors_of(cache) for cache in caches])
            self._caches = tuple(caches)
        self._chain.run(x, residual, angles, [_step_of(plan) for plan in plans])
        return x


def chain(
    layers: Sequence[FusedLayer], groups: Sequence[int], ropes: Sequence[int]
) -> FusedLayers | None:
    """One call for layers that all are of this module."""
    ours = [layer.layer for layer in layers if isinstance(layer, FusedCpuLayer)]
    return FusedCpuLayers(ours, groups, ropes) if ours and len(ours) == len(layers) else None


def _tensors_of(cache: LayerCache) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    tensors = cache.tensors
    return tensors["k"], tensors["v"], tensors.get("k_scale"), tensors.get("v_scale")


def _step_of(plan: AttentionPlan) -> kernels_cpu.Step:
    assert isinstance(plan, NativePlan)
    return plan.step


def _mlp_of(parts: _Parts) -> kernels_cpu.FusedMlp | None:
    """What follows attention, if the kernels multiply by all of it."""
    if isinstance(parts, MixtureLayerParts):
        return _mixture_of(parts)
    gate_up, down = _payload(parts.gate_up), _payload(parts.down)
    return None if gate_up is None or down is None else (gate_up, down)


def _mixture_of(parts: MixtureLayerParts) -> kernels_cpu.FusedMixture | None:
    dtype, routing, experts = parts.following_norm.dtype, parts.routing, parts.experts.payload
    router, is_shared = _payload(parts.router), parts.shared_down is not None
    shared_gate_up, shared_down = _payload(parts.shared_gate_up), _payload(parts.shared_down)
    if router is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    if is_shared and (shared_gate_up is None or shared_down is None):
        return None
    if not isinstance(experts, kernels_cpu.PackedExpertWeights | kernels_cpu.PackedExpertCodes):
        return None
    if routing.score not in ("softmax", "sigmoid"):
        return None
    bias = parts.correction_bias
    return kernels_cpu.FusedMixture(
        dtype,
        router,
        experts,
        bias=None if bias is None else bias.float().contiguous(),
        shared=None
        if shared_gate_up is None or shared_down is None
        else (shared_gate_up, shared_down),
        gate=parts.activation,
        num_chosen=routing.num_chosen,
        num_groups=routing.num_groups,
        num_kept_groups=routing.num_kept_groups,
        scale=routing.scale,
        is_sigmoid=routing.score == "sigmoid",
        is_renormalised=routing.is_renormalised,
        adds_two_best=routing.group_score == "top2",
    )


def _payload(linear: PackedLinear | None) -> kernels_cpu.PackedWeights | None:
    payload = None if linear is None else linear.payload
    return payload if isinstance(payload, kernels_cpu.PackedWeights) else None


def _norms(parts: _Parts) -> tuple[Tensor | None, ...]:
    """In the order of `FusedDecoderLayer`."""
    norms = (
        parts.attention_output_norm,
        parts.mlp_norm,
        parts.mlp_output_norm,
        parts.following_norm,
        parts.q_norm,
        parts.k_norm,
    )
    return tuple(None if norm is None else norm.contiguous() for norm in norms)
