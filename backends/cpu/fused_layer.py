"""Whole decoder layers by the compiled kernels: which layers they take, and how tensors go in.

At one token a step, the interpreter between the operators of a small model takes longer than some
of them; and the threads of the kernels fall asleep meanwhile, and must be woken.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not

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
    PackedLinear,
)

_ACTIVATIONS = frozenset({"silu", "gelu_tanh", "gelu"})


def fuse(parts: DecoderLayerParts, attention: AttentionBackend) -> FusedLayer | None:
    """One call for a layer; None where an operator of it is not one of the compiled kernels."""
    if type(attention) is not CpuAttention or not attention.provider().startswith("native"):
        return None
    spec = attention.spec
    linears = _packed(parts)
    is_plain = spec.kind in ("causal", "sliding_window", "chunked") and not spec.has_alibi
    is_plain = is_plain and spec.head_size == spec.v_head_size == parts.head_size
    if linears is None or not is_plain or parts.activation not in _ACTIVATIONS:
        return None
    norms = _norms(parts)
    dtype = parts.following_norm.dtype
    if any(norm is not None and norm.dtype != dtype for norm in norms):
        return None
    if spec.dtype != str(dtype).removeprefix("torch."):
        return None
    layer = kernels_cpu.FusedDecoderLayer(
        dtype,
        linears,
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


def _packed(
    parts: DecoderLayerParts,
) -> (
    tuple[
        kernels_cpu.PackedWeights,
        kernels_cpu.PackedWeights,
        kernels_cpu.PackedWeights,
        kernels_cpu.PackedWeights,
    ]
    | None
):
    """The linear layers, if the kernels multiply by all of them."""
    qkv, output, gate_up, down = map(_payload, (parts.qkv, parts.output, parts.gate_up, parts.down))
    if qkv is None or output is None or gate_up is None or down is None:
        return None
    return qkv, output, gate_up, down


def _payload(linear: PackedLinear) -> kernels_cpu.PackedWeights | None:
    payload = linear.payload
    return payload if isinstance(payload, kernels_cpu.PackedWeights) else None


def _norms(parts: DecoderLayerParts) -> tuple[Tensor | None, ...]:
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
