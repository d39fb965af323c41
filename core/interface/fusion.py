"""What a device needs to compute whole decoder layers in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from quire.core.interface.attention import AttentionPlan, LayerCache
    from quire.core.interface.ops import PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayerParts:
    """A layer of attention and one MLP, in the order in which they are computed.

    With x normalised: qkv of x, norms of queries and keys, rotary, attention, `output`, its norm;
    residual += that, `mlp_norm`; `gate_up`, the gated activation, `down`, its norm; residual +=
    that, `following_norm`. Norms are RMS norms with `eps`.
    """

    qkv: PackedLinear
    """Query, key and value, stacked: heads of `head_size`."""
    output: PackedLinear
    gate_up: PackedLinear
    """Gate and up, stacked."""
    down: PackedLinear
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
