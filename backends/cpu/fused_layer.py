"""Whole layers by the compiled kernels: which layers they take, and how tensors go in.

At one token a step, the interpreter between the operators of a small model takes longer than some
of them; and the threads of the kernels fall asleep meanwhile, and must be woken.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not

import torch
from torch import Tensor

from quire import kernels_cpu
from quire.backends.cpu import fused_mixer
from quire.backends.cpu.attention import CpuAttention, NativePlan
from quire.core.interface import (
    AttentionBackend,
    AttentionPlan,
    DeltaMixerParts,
    DenseParts,
    FusedLayer,
    FusedLayers,
    HeadParts,
    LatentParts,
    LayerCache,
    LayerParts,
    MixerParts,
    Mixing,
    MixingPlace,
    MixingPlan,
    MixtureParts,
    PackedLinear,
)

_ACTIVATIONS = frozenset({"silu", "gelu_tanh", "gelu"})
_KINDS = frozenset({"causal", "sliding_window", "chunked"})


def fuse(parts: LayerParts, attention: AttentionBackend | None) -> FusedLayer | None:
    """One call for a layer; None where an operator of it is not one of the compiled kernels."""
    dtype = parts.following_norm.dtype
    mixings = [_mixing_of(mixing, attention, dtype) for mixing in parts.mixings]
    known = [mixing for mixing in mixings if mixing is not None]
    mlp: kernels_cpu.FusedMlp | None = None
    if isinstance(parts.mlp, MixtureParts):
        mlp = _mixture_of(parts.mlp, dtype)
    elif parts.mlp is not None:
        mlp = _dense_of(parts.mlp)
    norms = [parts.mixing_norm, parts.mlp_norm, parts.mlp_output_norm, parts.following_norm]
    if len(known) != len(mixings) or (mlp is None) != (parts.mlp is None):
        return None
    if not _are_of(dtype, norms) or (parts.is_residual_wide and mlp is not None):
        return None
    dense = [None if norm is None else norm.contiguous() for norm in norms]
    return FusedCpuLayer(
        kernels_cpu.FusedWholeLayer(
            known,
            mlp,
            dense,
            gate=_gate_of(parts.mlp),
            eps=parts.eps,
            is_residual_wide=parts.is_residual_wide,
        )
    )


class FusedCpuLayer:
    """A `FusedLayer` by the compiled kernels."""

    __slots__ = ("layer",)

    def __init__(self, layer: kernels_cpu.FusedWholeLayer) -> None:
        self.layer = layer


class FusedCpuLayers:
    """`FusedLayers` by the compiled kernels."""

    __slots__ = ("_caches", "_chain")

    def __init__(
        self,
        layers: Sequence[kernels_cpu.FusedWholeLayer],
        places: Sequence[Sequence[MixingPlace]],
    ) -> None:
        self._chain = kernels_cpu.LayerChain(
            layers,
            [[place.cache for place in of_layer] for of_layer in places],
            [[place.plan for place in of_layer] for of_layer in places],
            [[place.angles for place in of_layer] for of_layer in places],
        )
        self._caches: Sequence[LayerCache] = ()

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[LayerCache],
        plans: Sequence[MixingPlan],
    ) -> Tensor:
        if len(caches) != len(self._caches) or any(map(is_not, caches, self._caches)):
            self._chain.bind([cache.tensors for cache in caches])
            self._caches = tuple(caches)
        self._chain.run(x, residual, angles, [_part_of(plan, len(x)) for plan in plans])
        return x


def chain(
    layers: Sequence[FusedLayer], places: Sequence[Sequence[MixingPlace]]
) -> FusedLayers | None:
    """One call for layers that all are of this module."""
    ours = [layer.layer for layer in layers if isinstance(layer, FusedCpuLayer)]
    return FusedCpuLayers(ours, places) if ours and len(ours) == len(layers) else None


def _part_of(plan: MixingPlan, num_tokens: int) -> kernels_cpu.Step | kernels_cpu.Rounds:
    if isinstance(plan, AttentionPlan):
        assert isinstance(plan, NativePlan)
        return plan.step
    return fused_mixer.rounds_of(plan, num_tokens)


def _mixing_of(
    parts: Mixing, attention: AttentionBackend | None, dtype: torch.dtype
) -> kernels_cpu.FusedMixing | None:
    if isinstance(parts, MixerParts):
        return fused_mixer.mixer_of(parts)
    if isinstance(parts, DeltaMixerParts):
        return fused_mixer.delta_of(parts)
    if type(attention) is not CpuAttention or not attention.provider().startswith("native"):
        return None
    if attention.spec.dtype != str(dtype).removeprefix("torch."):
        return None
    if isinstance(parts, LatentParts):
        return _latent_of(parts, attention, dtype)
    return _heads_of(parts, attention, dtype)


def _heads_of(
    parts: HeadParts, attention: CpuAttention, dtype: torch.dtype
) -> kernels_cpu.FusedHeads | None:
    spec, qkv, output = attention.spec, _payload(parts.qkv), _payload(parts.output)
    norms = [parts.q_norm, parts.k_norm, parts.rotated_norm]
    is_plain = spec.head_size == spec.v_head_size == parts.head_size and not spec.has_alibi
    if qkv is None or output is None or spec.kind not in _KINDS or not is_plain:
        return None
    if not _are_of(dtype, norms):
        return None
    return kernels_cpu.FusedHeads(
        dtype,
        qkv,
        output,
        [None if norm is None else norm.contiguous() for norm in norms],
        num_heads=parts.num_heads,
        num_kv_heads=parts.num_kv_heads,
        head_size=parts.head_size,
        num_pairs=parts.num_rotated // 2,
        eps=parts.eps,
        scale=spec.scale,
        is_interleaved=parts.is_rope_interleaved,
        window=(spec.window or 0) if spec.kind == "sliding_window" else 0,
        chunk=(spec.window or 0) if spec.kind == "chunked" else 0,
        soft_cap=spec.soft_cap or 0.0,
        sinks=parts.sinks,
        is_norm_joint=parts.is_qk_norm_joint,
        has_factors=parts.has_factors,
        has_gates=parts.has_gates,
    )


def _latent_of(
    parts: LatentParts, attention: CpuAttention, dtype: torch.dtype
) -> kernels_cpu.FusedLatent | None:
    spec, q_down = attention.spec, _payload(parts.q_down)
    q_up, kv_down, output = _payload(parts.q_up), _payload(parts.kv_down), _payload(parts.output)
    if spec.kind != "mla" or spec.soft_cap or (q_down is None) != (parts.q_down is None):
        return None
    if q_up is None or kv_down is None or output is None:
        return None
    if not _are_of(dtype, [parts.q_norm, parts.kv_norm, parts.key_up, parts.value_up]):
        return None
    return kernels_cpu.FusedLatent(
        dtype,
        q_down=q_down,
        q_norm=None if parts.q_norm is None else parts.q_norm.contiguous(),
        q_up=q_up,
        kv_down=kv_down,
        kv_norm=parts.kv_norm.contiguous(),
        key_up=parts.key_up,
        value_up=parts.value_up,
        output=output,
        num_pairs=parts.num_rotated // 2,
        eps=parts.eps,
        scale=spec.scale,
        is_interleaved=parts.is_rope_interleaved,
    )


def _dense_of(
    parts: DenseParts,
) -> tuple[kernels_cpu.PackedWeights, kernels_cpu.PackedWeights] | None:
    gate_up, down = _payload(parts.gate_up), _payload(parts.down)
    if gate_up is None or down is None or parts.activation not in _ACTIVATIONS:
        return None
    return gate_up, down


def _mixture_of(parts: MixtureParts, dtype: torch.dtype) -> kernels_cpu.FusedMixture | None:
    """If the kernels multiply by all of it."""
    routing, experts, bias = parts.routing, parts.experts.payload, parts.correction_bias
    router, shared_gate = _payload(parts.router), _payload(parts.shared_gate)
    shared = None if parts.shared is None else _dense_of(parts.shared)
    is_other = (shared is None) != (parts.shared is None)
    is_other = is_other or (shared_gate is None) != (parts.shared_gate is None)
    if router is None or is_other or dtype not in (torch.float32, torch.bfloat16):
        return None
    if not isinstance(experts, kernels_cpu.PackedExpertWeights | kernels_cpu.PackedExpertCodes):
        return None
    if routing.score not in ("softmax", "sigmoid"):
        return None
    if parts.weighs_input and (bias is not None or routing.num_groups > 1 or routing.scale != 1.0):
        return None
    return kernels_cpu.FusedMixture(
        dtype,
        router,
        experts,
        bias=None if bias is None else bias.float().contiguous(),
        shared=shared,
        shared_gate=shared_gate,
        gate=_gate_of(parts),
        num_chosen=routing.num_chosen,
        num_groups=routing.num_groups,
        num_kept_groups=routing.num_kept_groups,
        scale=routing.scale,
        is_sigmoid=routing.score == "sigmoid" or parts.weighs_input,
        is_renormalised=routing.is_renormalised and not parts.weighs_input,
        adds_two_best=routing.group_score == "top2",
        weighs_input=parts.weighs_input,
    )


def _gate_of(mlp: DenseParts | MixtureParts | None) -> str:
    """Of the dense MLP, or of the one that a mixture shares; any where there is none."""
    dense = mlp.shared if isinstance(mlp, MixtureParts) else mlp
    return "silu" if dense is None else dense.activation


def _payload(linear: PackedLinear | None) -> kernels_cpu.PackedWeights | None:
    payload = None if linear is None else linear.payload
    return payload if isinstance(payload, kernels_cpu.PackedWeights) else None


def _are_of(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.dtype == dtype for tensor in tensors)
