"""What a decoder-only transformer is made of, as plain data: one `DecoderSpec` for every family.

A family (`quire.core.models.families`) is a pure function from a Hugging Face config to this one;
one implementation (`quire.core.models.decoder`) runs them all. Knows no torch, so that a plan can
be made before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """One kind of rotary position embedding; a model has one, or one for each type of layer."""

    rope_type: str
    """`default`, or a key of transformers' `ROPE_INIT_FUNCTIONS`: `linear`, `yarn`, ..."""
    parameters: Mapping[str, Any] = field(hash=False)
    """The config's `rope_parameters` for these layers: `rope_theta`, `factor`, ..."""
    head_size: int
    max_position_embeddings: int
    """As the config says it, before any scaling."""

    @property
    def rotary_size(self) -> int:
        """How many features of a head are rotated, from the first."""
        return int(self.head_size * self.parameters.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A decoder of L layers: embedding, [norm, attention, norm, gated MLP] x L, norm, head."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_model_len: int
    """The most tokens that the model was made for, scaling of RoPE included."""
    layer_windows: tuple[int | None, ...]
    """For each layer, its sliding window; None: it sees everything."""
    ropes: tuple[RopeSpec, ...]
    layer_ropes: tuple[int, ...]
    """For each layer, the index into `ropes`."""
    attention_scale: float
    """Multiplies q . k."""
    norm_eps: float
    activation: str = "silu"
    """What `Ops.gated_activation` calls it."""
    norm_offset: float = 0.0
    """Added to the weights of all norms at load; 1 where the checkpoint has w of `x * (1 + w)`."""
    embedding_scale: float = 1.0
    """Multiplies the embeddings."""
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    has_qk_norm: bool = False
    """Queries and keys are normalised a head, before they are rotated."""
    has_sandwich_norms: bool = False
    """Attention and MLP are also normalised on their way out, before the residual takes them."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    has_tied_embeddings: bool = False
    """The head is the embedding table."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layer_windows)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Outputs of the query, key and value projections."""
        kv_size = self.num_kv_heads * self.head_size
        return self.num_heads * self.head_size, kv_size, kv_size
