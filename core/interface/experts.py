"""Mixtures of experts: how tokens choose, and what a device makes of the experts' weights.

Extension `moe`. T tokens, E experts, k of them for each token, H hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quire.core.interface.quantization import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSpec:
    """How a token chooses its experts.

    scores = score(logits); chosen = the k experts with the largest scores + correction bias, of the
    groups that remain; weights = their scores (without the bias), made to sum to one where
    `is_renormalised`, times `scale`. Ties go to the lowest id. The softmax of the chosen logits
    alone is `softmax` with `is_renormalised`.

    Source: Shazeer et al. 2017, eq. 3-5; group limits and bias: DeepSeek-V3 report, section 2.1.2.
    """

    num_experts: int
    num_chosen: int
    """k."""
    score: str = "softmax"
    """`softmax` over all experts, or `sigmoid` of each."""
    is_renormalised: bool = True
    scale: float = 1.0
    num_groups: int = 1
    """The experts lie in so many groups of equal size, one after the other."""
    num_kept_groups: int = 1
    """How many groups remain: those with the largest group scores."""
    group_score: str = "max"
    """A group's score: `max` of its experts', or `top2`: the sum of the two largest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertWeights:
    """The experts of one layer as they were loaded. Biases may be None."""

    gate_up: Tensor
    """[E, 2I, H]: the gate's rows, then the other's."""
    down: Tensor
    """[E, H, I]."""
    gate_up_bias: Tensor | None = None
    """[E, 2I]."""
    down_bias: Tensor | None = None
    """[E, H]."""
    activation: str = "silu"
    """Of `Ops.gated_activation`, or `clamped_swiglu`: with g = min(gate, limit) and u = clamp(up,
    -limit, limit): g * sigmoid(alpha * g) * (u + 1).
    """
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedExperts:
    """The experts of one layer in 4 or 8 bits, for devices that claim `quantized_experts`.

    All of `gate_up` have one form, and all of `down`; the two may differ in bits and groups, but
    the activations of both are rounded or of neither. They come in 8-bit floats where the device
    claims the quantization `fp8` besides. Otherwise as `ExpertWeights`.
    """

    gate_up: Sequence[QuantizedWeight]
    """E of them, each [2I, H]."""
    down: Sequence[QuantizedWeight]
    """E of them, each [H, I]."""
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0


@dataclass(slots=True, kw_only=True)
class PackedExperts:
    """The experts of one layer in the form that a device multiplies fastest; opaque to others."""

    num_experts: int
    hidden_size: int
    dtype: str
    """Of the activations that go in and come out."""
    format: str
    """How the weights are kept, shown by `quire plan`."""
    size_bytes: int
    """Memory that the packed weights hold, beyond tensors that they share with others."""
    payload: object = field(repr=False)
    """The backend's own."""
