"""Mixtures of experts in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from quire.backends.reference import quantization
from quire.core.interface import ExpertWeights, PackedExperts, QuantizedExperts, RoutingSpec

_APPROXIMATIONS = {"gelu": "none", "gelu_tanh": "tanh"}


def route(
    logits: Tensor, spec: RoutingSpec, correction_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`Ops.route_experts`."""
    scores = _scores(logits.float(), spec)
    choosing = scores if correction_bias is None else scores + correction_bias
    if spec.num_kept_groups < spec.num_groups:
        choosing = choosing.masked_fill(~_in_kept_groups(choosing, spec), float("-inf"))
    # Not topk: it promises nothing about ties.
    order = choosing.argsort(dim=-1, descending=True, stable=True)
    expert_ids = order[:, : spec.num_chosen]
    weights = scores.gather(-1, expert_ids)
    if spec.is_renormalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * spec.scale, expert_ids


def _scores(logits: Tensor, spec: RoutingSpec) -> Tensor:
    if spec.score == "softmax":
        return logits.softmax(-1)
    if spec.score == "sigmoid":
        return logits.sigmoid()
    raise ValueError(f"route_experts was asked for score {spec.score!r}; it knows softmax, sigmoid")


def _in_kept_groups(choosing: Tensor, spec: RoutingSpec) -> Tensor:
    """Which experts are in a group that remains: bool [T, E]."""
    grouped = choosing.unflatten(-1, (spec.num_groups, -1))
    best = grouped.topk(2 if spec.group_score == "top2" else 1, dim=-1).values.sum(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept.scatter_(1, order[:, : spec.num_kept_groups], True)
    return kept.unsqueeze(-1).expand_as(grouped).flatten(1)


def pack(weights: ExpertWeights) -> PackedExperts:
    """`Ops.pack_experts`: as they were loaded."""
    return PackedExperts(
        num_experts=weights.gate_up.shape[0],
        hidden_size=weights.gate_up.shape[2],
        dtype=str(weights.gate_up.dtype).removeprefix("torch."),
        format="dense",
        size_bytes=0,
        payload=weights,
    )


@dataclass(frozen=True, slots=True, eq=False)
class WidenedExperts:
    """Quantized experts with their weights in float32."""

    gate_up: list[quantization.WidenedWeights]
    down: list[quantization.WidenedWeights]
    activation: str
    alpha: float
    limit: float

    def run(self, x: Tensor, expert: int) -> Tensor:
        """x [n, H] through one expert: float32 [n, H]."""
        both = quantization.multiply(x.float(), self.gate_up[expert])
        inner = activate(both, self).to(x.dtype)
        return quantization.multiply(inner.float(), self.down[expert])


def pack_quantized(weights: QuantizedExperts, dtype: str) -> PackedExperts:
    """`Ops.pack_quantized_experts`."""
    layers = []
    sides = ((weights.gate_up, weights.gate_up_bias), (weights.down, weights.down_bias))
    for of_experts, biases in sides:
        packed = [
            quantization.pack(weight, None if biases is None else biases[expert], dtype)
            for expert, weight in enumerate(of_experts)
        ]
        layers.append(packed)
    gate_up, down = ([_widened(layer.payload) for layer in side] for side in layers)
    return PackedExperts(
        num_experts=len(gate_up),
        hidden_size=weights.gate_up[0].num_inputs,
        dtype=dtype,
        format=layers[0][0].format,
        size_bytes=sum(layer.size_bytes for side in layers for layer in side),
        payload=WidenedExperts(gate_up, down, weights.activation, weights.alpha, weights.limit),
    )


def _widened(payload: object) -> quantization.WidenedWeights:
    assert isinstance(payload, quantization.WidenedWeights)
    return payload


def experts(
    x: Tensor, packed: PackedExperts, weights: Tensor, expert_ids: Tensor, *, weighs_input: bool
) -> Tensor:
    """`Ops.experts`: expert by expert, over the tokens that chose it."""
    loaded = packed.payload
    assert isinstance(loaded, ExpertWeights | WidenedExperts), packed
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in expert_ids.unique().tolist():
        tokens, slots = (expert_ids == expert).nonzero(as_tuple=True)
        share = weights[tokens, slots].unsqueeze(-1).to(wide)
        taken = x[tokens]
        if weighs_input:
            taken = (taken.to(wide) * share).to(x.dtype)
        result = _one_expert(taken, loaded, expert).to(wide)
        out.index_add_(0, tokens, result if weighs_input else result * share)
    return out.to(x.dtype)


def _one_expert(x: Tensor, loaded: ExpertWeights | WidenedExperts, expert: int) -> Tensor:
    if isinstance(loaded, WidenedExperts):
        return loaded.run(x, expert)

    def bias(of: Tensor | None) -> Tensor | None:
        return None if of is None else of[expert]

    both = F.linear(x, loaded.gate_up[expert], bias(loaded.gate_up_bias))
    return F.linear(activate(both, loaded), loaded.down[expert], bias(loaded.down_bias))


def activate(both: Tensor, loaded: ExpertWeights | WidenedExperts) -> Tensor:
    """The activation of the experts: [n, 2I] to [n, I], rounded once to the dtype."""
    gate, up = (both if both.dtype == torch.float64 else both.float()).chunk(2, dim=-1)
    if loaded.activation == "clamped_swiglu":
        gate = gate.clamp(max=loaded.limit)
        up = up.clamp(-loaded.limit, loaded.limit)
        return (gate * torch.sigmoid(loaded.alpha * gate) * (up + 1)).to(both.dtype)
    if loaded.activation == "silu":
        return (F.silu(gate) * up).to(both.dtype)
    approximate = _APPROXIMATIONS.get(loaded.activation)
    if approximate is None:
        known = ", ".join(("silu", "clamped_swiglu", *_APPROXIMATIONS))
        raise ValueError(f"experts were asked for {loaded.activation!r}; they know {known}")
    return (F.gelu(gate, approximate=approximate) * up).to(both.dtype)
