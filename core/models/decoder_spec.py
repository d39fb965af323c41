"""What a decoder-only transformer is made of, as plain data: one `DecoderSpec` for every family.

A family (`quire.core.models.families`) is a pure function from a Hugging Face config to this one;
one implementation (`quire.core.models.decoder`) runs them all. Knows no torch, so that a plan can
be made before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire.core.interface.experts import RoutingSpec


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
class MixtureSpec:
    """The layers whose MLP is a mixture of experts."""

    layers: frozenset[int]
    routing: RoutingSpec
    intermediate_size: int
    """Of one expert."""
    activation: str = "silu"
    """As in `ExpertWeights`."""
    alpha: float = 1.702
    limit: float = 7.0
    shared_size: int = 0
    """The intermediate size of the expert that every token goes through; 0: there is none."""
    has_shared_gate: bool = False
    """The shared expert is weighed by a sigmoid of its own."""
    has_router_bias: bool = False
    has_correction_bias: bool = False
    has_expert_bias: bool = False
    weighs_input: bool = False
    """What an expert is given is multiplied by its weight, not what it answers; chosen are those of
    the largest logits, and their sigmoids weigh."""

    def num_expert_weights(self, hidden_size: int) -> int:
        """Of the experts of all layers, without biases."""
        of_one = 3 * hidden_size * self.intermediate_size
        return len(self.layers) * self.routing.num_experts * of_one


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureSpec:
    """How queries grow with their position: by log(1 + floor((p + 1) / floor)) * scale + 1.

    Source: Nakanishi 2025 (scalable softmax), in the form of Llama 4.
    """

    floor: float
    """So many tokens are not changed, and the factor is the same for as many more."""
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Attention whose cache holds one latent for all heads. Source: DeepSeek-V2 report, 2.1."""

    kv_rank: int
    """R: features of the latent, from which keys and values of every head are made."""
    q_rank: int | None
    """Features that queries are squeezed into; None: they are not."""
    plain_size: int
    """Features of a head's key that come from the latent, without rotation."""
    rotary_size: int
    """P: features of the key that are rotated and shared by all heads."""
    value_size: int
    """Of a head."""

    @property
    def cached_size(self) -> int:
        """R + P: numbers that the cache holds of a token."""
        return self.kv_rank + self.rotary_size


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
    """For each layer, its window; None: it sees everything."""
    ropes: tuple[RopeSpec, ...]
    layer_ropes: tuple[int | None, ...]
    """For each layer, the index into `ropes`; None: it does not rotate."""
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
    """Queries and keys are normalised, before they are rotated."""
    is_qk_norm_joint: bool = False
    """Over all heads together, instead of each by itself."""
    has_sinks: bool = False
    """As in `AttentionSpec`."""
    has_attention_gate: bool = False
    """Beside each query is a gate, whose sigmoid multiplies what the head's attention gives; they
    come from one projection, a head's query and then its gate."""
    is_rope_interleaved: bool = False
    """As in `Ops.rotary`."""
    are_windows_chunks: bool = False
    """Windows do not slide: they are laid side by side, and a token sees its own alone."""
    has_rotated_norm: bool = False
    """Queries and keys are normalised after they are rotated, without weights."""
    temperature: TemperatureSpec | None = None
    """Of the layers that do not rotate."""
    mixture: MixtureSpec | None = None
    latent: LatentSpec | None = None
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
    def attention_size(self) -> int:
        """Features that come out of attention, all heads together."""
        value_size = self.latent.value_size if self.latent else self.head_size
        return self.num_heads * value_size

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Lengths of the weights of the norms of queries and keys."""
        k_size = self.num_kv_heads * self.head_size
        q_size = self.num_heads * self.head_size
        return (q_size, k_size) if self.is_qk_norm_joint else (self.head_size, self.head_size)

    def position_table(self, layer: int) -> int:
        """Which table a layer looks its positions up in: one for each rope, then temperatures.

        A layer that looks up nothing is given the first.
        """
        rope = self.layer_ropes[layer]
        if rope is not None:
            return rope
        return 0 if self.temperature is None else len(self.ropes)

    def is_sparse(self, layer: int) -> bool:
        """Whether the MLP of a layer is a mixture of experts."""
        return self.mixture is not None and layer in self.mixture.layers

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Outputs of the query, key and value projections; gates count with their queries."""
        kv_size = self.num_kv_heads * self.head_size
        q_size = self.num_heads * self.head_size
        return 2 * q_size if self.has_attention_gate else q_size, kv_size, kv_size
