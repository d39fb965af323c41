"""What a device needs to compute whole decoder layers in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quire.core.interface.attention import AttentionPlan, LayerCache
    from quire.core.interface.experts import PackedExperts, RoutingSpec
    from quire.core.interface.ops import PackedLinear
    from quire.core.interface.recurrence import StateSlots


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerParts:
    """What layers have in common, in the order in which it is computed.

    With x normalised: qkv of x, norms of queries and keys, rotary, attention, `output`, its norm;
    residual += that, `mlp_norm`; what stands in the place of the MLP, its norm; residual += that,
    `following_norm`. Norms are RMS norms with `eps`.
    """

    qkv: PackedLinear
    """Query, key and value, stacked: heads of `head_size`."""
    output: PackedLinear
    mlp_norm: Tensor
    """[H]."""
    following_norm: Tensor
    """[H]: of the next layer, or the last of the model."""
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_rotated: int
    """Features of a head that are rotated."""
    activation: str
    """Of the gate, as `Ops.gated_activation` names it."""
    eps: float
    is_rope_interleaved: bool
    attention_output_norm: Tensor | None = None
    """[H]."""
    mlp_output_norm: Tensor | None = None
    """[H]."""
    q_norm: Tensor | None = None
    """[D], or over all heads [Hq * D]."""
    k_norm: Tensor | None = None
    is_qk_norm_joint: bool = False
    sinks: Tensor | None = None
    """float32 [Hq]."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayerParts(LayerParts):
    """A layer of attention and one MLP: `gate_up`, the gated activation, `down`."""

    gate_up: PackedLinear
    """Gate and up, stacked."""
    down: PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureLayerParts(LayerParts):
    """A layer of attention and a mixture of experts.

    The router of x in float32, `Ops.route_experts`, `Ops.experts`, to which what the shared MLP
    makes of x is added, if there is one.
    """

    router: PackedLinear
    """From `Ops.pack_router`."""
    routing: RoutingSpec
    experts: PackedExperts
    correction_bias: Tensor | None = None
    """float32 [E]."""
    shared_gate_up: PackedLinear | None = None
    shared_down: PackedLinear | None = None


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

FusedLayer = Callable[
    ["Tensor", "Tensor", tuple["Tensor", "Tensor"], "LayerCache", "AttentionPlan"], "Tensor"
]
"""(x, residual, (cos, sin), cache, plan) -> the normalised input [T, H] of what follows.

x [T, H] is normalised; it may be overwritten, and be what is returned. `residual` [T, H] is added
to in place; cos, sin float32 [T, F]; the step's keys and values are written to `cache`; `plan` is
what the layer's attention planned.
"""

FusedLayers = Callable[
    [
        "Tensor",
        "Tensor",
        Sequence[tuple["Tensor", "Tensor"]],
        Sequence["LayerCache"],
        Sequence["AttentionPlan"],
    ],
    "Tensor",
]
"""(x, residual, angles, caches, plans) -> the normalised input [T, H] of what follows the last.

As `FusedLayer` for layers that follow each other: `angles` of each rope, `caches` of each layer,
`plans` of each group of layers.
"""
