"""What a device needs to compute whole decoder layers in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

    from quire.core.interface.attention import AttentionPlan, LayerCache
    from quire.core.interface.experts import PackedExperts, RoutingSpec
    from quire.core.interface.ops import PackedLinear
    from quire.core.interface.recurrence import StateSlots


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HeadParts:
    """Attention with keys and values of its own heads, in the order in which it is computed.

    With x normalised: qkv of x; norms of queries and keys; rotary; `rotated_norm` of both; queries
    times their token's factor; attention; its result times sigmoid(gates); `output`. Norms are RMS
    norms with `eps`.
    """

    qkv: PackedLinear
    """Query, key and value, stacked: heads of `head_size`; then gates [Hq * D], if it has them."""
    output: PackedLinear
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_rotated: int
    """Features of a head that are rotated; 0: positions change nothing here."""
    is_rope_interleaved: bool
    eps: float
    q_norm: Tensor | None = None
    """[D], or over all heads [Hq * D]."""
    k_norm: Tensor | None = None
    is_qk_norm_joint: bool = False
    rotated_norm: Tensor | None = None
    """[D], of queries and keys after the rotation."""
    has_factors: bool = False
    """The layer is given factors float32 [T, 1] in the place of cosines."""
    has_gates: bool = False
    sinks: Tensor | None = None
    """float32 [Hq]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LatentParts:
    """Attention over a latent that all heads share, in the order in which it is computed.

    kv_down of x gives the latent [T, R], which is normalised, and features [T, P], which are
    rotated: the key of the only head. Queries [T, Hq, plain + P] come from x, or from what q_down
    makes of it, normalised; their last P features are rotated, the others go to the latent by
    `key_up`. After attention `value_up` makes a value of each head's latent; then `output`.
    Source: DeepSeek-V2 report, section 2.1 and appendix C.
    """

    q_down: PackedLinear | None
    q_norm: Tensor | None
    """Of what q_down gives."""
    q_up: PackedLinear
    kv_down: PackedLinear
    kv_norm: Tensor
    """[R]."""
    key_up: Tensor
    """[Hq, R, plain]."""
    value_up: Tensor
    """[Hq, value, R]."""
    output: PackedLinear
    num_rotated: int
    """P."""
    is_rope_interleaved: bool
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixerParts:
    """A mixer of Mamba or Mamba-2, in the order in which it is computed.

    Mamba (`x_proj` is there): `in_proj` gives channels x [T, C] and gates [T, C]; x is convolved
    with silu; `x_proj` of it gives time steps [T, R], B and C [T, N], each with its inner norm;
    dt = softplus(`dt_proj` of the steps + dt_bias); `selective_scan`; times silu(gate).
    Mamba-2: `in_proj` gives gates [T, C], x with B and C [T, C + 2GN], and steps [T, M]; x, B and C
    are convolved with silu; dt = softplus(steps + dt_bias); `ssd_scan`; the gated norm. Then
    `out_proj`. Shapes and dtypes of weights are those of `Ops.causal_conv1d` and of the scans.
    """

    in_proj: PackedLinear
    out_proj: PackedLinear
    conv: Tensor
    conv_bias: Tensor | None
    a: Tensor
    d: Tensor
    dt_bias: Tensor
    state_size: int
    """N."""
    num_groups: int
    """G; 1 of Mamba."""
    eps: float
    """Of the norms."""
    x_proj: PackedLinear | None = None
    dt_proj: PackedLinear | None = None
    inner_norms: tuple[Tensor, Tensor, Tensor] | None = None
    """Of time steps [R], B and C [N]."""
    norm: Tensor | None = None
    """[C], over each of G groups, of Mamba-2; None: the gate alone."""
    is_norm_first: bool = False
    """norm(y) silu(gate) instead of norm(y silu(gate))."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeltaMixerParts:
    """A mixer of a gated delta net, in the order in which it is computed.

    `in_proj` gives queries and keys [T, GD] each with values [T, M Dv], gates [T, M Dv], betas
    [T, M] and steps [T, M]; the first three are convolved with silu; queries and keys get the
    length 1 (1e-6 added to its square), queries times D^-1/2; decay = a softplus(steps + dt_bias),
    beta = sigmoid(betas); `gated_delta_rule`; the RMS norm of each head times silu(gate), all of it
    in float32 from the convolution on; then `out_proj`. Shapes and dtypes of weights are those of
    `Ops.causal_conv1d` and `Ops.gated_delta_rule`.
    """

    in_proj: PackedLinear
    out_proj: PackedLinear
    conv: Tensor
    conv_bias: Tensor | None
    a: Tensor
    """float32 [M]; negative."""
    dt_bias: Tensor
    """float32 [M]."""
    norm: Tensor
    """float32 [Dv]."""
    key_size: int
    """D."""
    eps: float
    """Of the norm."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenseParts:
    """One MLP: `gate_up`, the gated activation, `down`."""

    gate_up: PackedLinear
    """Gate and up, stacked."""
    down: PackedLinear
    activation: str
    """Of the gate, as `Ops.gated_activation` names it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureParts:
    """A mixture of experts: the router of x in float32, the choice, `Ops.experts`, the shared MLP.

    The choice is `Ops.route_experts`; with `weighs_input`, the experts of the largest logits, whose
    sigmoids weigh their inputs. What the shared MLP makes of x is added, times sigmoid(shared_gate
    of x) if that is there.
    """

    router: PackedLinear
    """From `Ops.pack_router`."""
    routing: RoutingSpec
    experts: PackedExperts
    weighs_input: bool = False
    correction_bias: Tensor | None = None
    """float32 [E]."""
    shared: DenseParts | None = None
    shared_gate: PackedLinear | None = None
    """[1, H]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParts:
    """A whole layer, in the order in which it is computed.

    With x normalised: the sum of what the mixings make of it, its norm; residual += that,
    `mlp_norm`; the MLP, its norm; residual += that, `following_norm`. Without an MLP,
    `following_norm` stands in the place of `mlp_norm`. Norms are RMS norms [H] with `eps`.
    """

    mixings: Sequence[Mixing]
    """What tells the tokens of a text of one another: one, or several that are added up."""
    mlp: DenseParts | MixtureParts | None
    mlp_norm: Tensor | None
    """None if there is no MLP."""
    following_norm: Tensor
    """Of the next layer, or the last of the model."""
    eps: float
    mixing_norm: Tensor | None = None
    mlp_output_norm: Tensor | None = None
    is_residual_wide: bool = False
    """The residual is float32: sums are taken there, and rounded to the dtype before each norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixingPlace:
    """Which of a call's caches, plans and angles are those of a mixing."""

    cache: int
    plan: int
    angles: int = 0
    """Ignored where positions change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StatePieces:
    """Pieces of a step that do not wait for one another, as rows of the flat batch."""

    begins: Tensor
    """int32 [S], on the device."""
    ends: Tensor
    """int32 [S], on the device: piece s is rows [begins[s], ends[s])."""
    slots: StateSlots


FusedMixer = Callable[
    ["Tensor", tuple["Tensor", "Tensor"], Sequence[StatePieces]],
    "Tensor",
]
"""(x, pages, rounds) -> [T, H].

x [T, H] is normalised. pages: inputs of the convolution [num_blocks, C, W - 1] of x's dtype, and
states float32 [num_blocks, ...]; each round overwrites the blocks in which its pieces end, and may
start where one before it ended.
"""

Mixing: TypeAlias = HeadParts | LatentParts | MixerParts | DeltaMixerParts
"""What tells the tokens of a text of one another in a layer."""

MixingPlan: TypeAlias = "AttentionPlan | Sequence[StatePieces]"
"""What a layer's attention planned; of a mixer, its rounds."""


class FusedLayer(Protocol):
    """A layer that a device computes in one call, as `FusedLayers` of one layer would."""


FusedLayers = Callable[
    [
        "Tensor",
        "Tensor",
        Sequence[tuple["Tensor", "Tensor"]],
        Sequence["LayerCache"],
        Sequence[MixingPlan],
    ],
    "Tensor",
]
"""(x, residual, angles, caches, plans) -> the normalised input [T, H] of what follows the last.

x [T, H] is normalised; it may be overwritten, and be what is returned. `residual` [T, H] is added
to in place, in the dtype of x or, if it is wide, in float32. angles: (cos, sin) float32 [T, F] of
each rope, or factors [T, 1] twice. Keys, values and states of the step are written to the caches.
Which of all these a mixing reads, its `MixingPlace` says.
"""
