"""What follows attention in a layer: one MLP for all tokens, or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quire.core.interface.experts import PackedExperts, RoutingSpec
from quire.core.interface.fusion import DenseParts, MixtureParts
from quire.core.interface.ops import Ops, PackedLinear
from quire.core.models.decoder_spec import MixtureSpec


class Mlp(Protocol):
    """From x [T, H] to [T, H]."""

    def __call__(self, x: Tensor) -> Tensor:
        """The result; x is left as it is."""
        ...

    def parts(self) -> DenseParts | MixtureParts:
        """The same as a part of a whole layer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseWeights:
    """The weights of one MLP."""

    gate_up: PackedLinear
    """Gate and up, stacked."""
    down: PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureWeights:
    """The weights of a mixture of experts."""

    router: PackedLinear
    """float32: which expert is chosen must not hang on rounding."""
    correction_bias: Tensor | None
    """float32 [E]."""
    experts: PackedExperts
    shared: DenseWeights | None
    shared_gate: PackedLinear | None


class DenseMlp:
    """down(act(gate(x)) * up(x))."""

    __slots__ = ("_activation", "_down", "_gate_up", "_gated_activation", "_linear")

    def __init__(self, activation: str, weights: DenseWeights, ops: Ops) -> None:
        self._activation = activation
        self._gate_up = weights.gate_up
        self._down = weights.down
        self._linear = ops.linear
        self._gated_activation = ops.gated_activation

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H]."""
        inner = self._gated_activation(self._linear(x, self._gate_up), self._activation)
        return self._linear(inner, self._down)

    def parts(self) -> DenseParts:
        """The same as a part of a whole layer."""
        return DenseParts(gate_up=self._gate_up, down=self._down, activation=self._activation)


class MixtureMlp:
    """The experts that each token chooses, and the one that all share."""

    def __init__(
        self, mixture: MixtureSpec, activation: str, weights: MixtureWeights, ops: Ops
    ) -> None:
        self._routing = mixture.routing
        self._weighs_input = mixture.weighs_input
        self._weights = weights
        self._ops = ops
        self._shared = DenseMlp(activation, weights.shared, ops) if weights.shared else None

    def __call__(self, x: Tensor) -> Tensor:
        """[T, H]."""
        ops, weights = self._ops, self._weights
        logits = ops.linear(x.float(), weights.router)
        if self._weighs_input:
            shares, expert_ids = _largest(logits, self._routing)
            out = ops.experts(x, weights.experts, shares, expert_ids, weighs_input=True)
        else:
            shares, expert_ids = ops.route_experts(logits, self._routing, weights.correction_bias)
            out = ops.experts(x, weights.experts, shares, expert_ids)
        if self._shared is None:
            return out
        shared = self._shared(x)
        if weights.shared_gate is not None:
            shared = shared * torch.sigmoid(ops.linear(x, weights.shared_gate))
        return out.add_(shared)

    def parts(self) -> MixtureParts:
        """The same as a part of a whole layer."""
        weights = self._weights
        return MixtureParts(
            router=weights.router,
            routing=self._routing,
            experts=weights.experts,
            weighs_input=self._weighs_input,
            correction_bias=weights.correction_bias,
            shared=None if self._shared is None else self._shared.parts(),
            shared_gate=weights.shared_gate,
        )


def _largest(logits: Tensor, routing: RoutingSpec) -> tuple[Tensor, Tensor]:
    """As `Ops.route_experts`: those of the largest logits, by their sigmoids.

    Large logits have equal sigmoids: to choose by these would break ties where there are none.
    """
    chosen, expert_ids = logits.topk(routing.num_chosen, dim=-1)
    return chosen.sigmoid(), expert_ids
