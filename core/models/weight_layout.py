"""Which tensors a checkpoint of a decoder holds, by name and shape, and how they merge.

Torch-free: `describe_model` counts parameters from it, the loader reads and checks files by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from quire.core.models.decoder_spec import DecoderSpec


def standard_name(name: str) -> str | None:
    """A checkpoint's name as a causal LM has it; None for what is computed and needs no loading.

    Checkpoints of bare models lack the prefix `model.`.
    """
    if name.endswith(("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")):
        return None
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """How a family calls its tensors. Names in a layer follow `layer`, without `.weight`."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{layer}."
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    input_norm: str = "input_layernorm"
    """Before attention."""
    attention_output_norm: str = "post_attention_layernorm"
    """After attention; only with sandwich norms."""
    mlp_norm: str = "post_attention_layernorm"
    """Before the MLP."""
    mlp_output_norm: str = "post_feedforward_layernorm"
    """After the MLP; only with sandwich norms."""
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Query, key, value; or one name where the checkpoint has them merged."""
    output: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Gate, up; or one name where the checkpoint has them merged."""
    down: str = "mlp.down_proj"
    rename: Callable[[str], str | None] = standard_name
    """A name as files have it to the name as above; None: not ours, ignore it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShape:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Its parameters."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTensors:
    """One linear layer; several tensors are stacked along the outputs."""

    weights: tuple[TensorShape, ...]
    """Each [N_i, K]."""
    biases: tuple[TensorShape, ...] = ()
    """Each [N_i]; empty: no bias."""

    def __iter__(self) -> Iterator[TensorShape]:
        yield from self.weights
        yield from self.biases


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """The tensors of one layer."""

    input_norm: TensorShape
    qkv: LinearTensors
    q_norm: TensorShape | None
    k_norm: TensorShape | None
    output: LinearTensors
    attention_output_norm: TensorShape | None
    mlp_norm: TensorShape
    gate_up: LinearTensors
    down: LinearTensors
    mlp_output_norm: TensorShape | None

    def __iter__(self) -> Iterator[TensorShape]:
        for linear in (self.qkv, self.output, self.gate_up, self.down):
            yield from linear
        norms = (self.input_norm, self.q_norm, self.k_norm, self.attention_output_norm)
        for norm in (*norms, self.mlp_norm, self.mlp_output_norm):
            if norm is not None:
                yield norm


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderTensors:
    """All tensors of a decoder."""

    embedding: TensorShape
    layers: tuple[LayerTensors, ...]
    final_norm: TensorShape
    lm_head: LinearTensors | None
    """None: tied to the embedding."""

    def __iter__(self) -> Iterator[TensorShape]:
        yield self.embedding
        for layer in self.layers:
            yield from layer
        yield self.final_norm
        if self.lm_head is not None:
            yield from self.lm_head

    @property
    def num_parameters(self) -> int:
        """Of all tensors; a tied head counts once."""
        return sum(tensor.num_elements for tensor in self)


def lay_out(decoder: DecoderSpec, names: WeightNames) -> DecoderTensors:
    """The tensors of `decoder` as `names` calls them."""
    table = (decoder.vocab_size, decoder.hidden_size)
    lm_head = LinearTensors(weights=(_weight(names.lm_head, *table),))
    return DecoderTensors(
        embedding=_weight(names.embedding, *table),
        layers=tuple(_lay_out_layer(decoder, names, i) for i in range(decoder.num_layers)),
        final_norm=_weight(names.final_norm, decoder.hidden_size),
        lm_head=None if decoder.has_tied_embeddings else lm_head,
    )


def _lay_out_layer(decoder: DecoderSpec, names: WeightNames, layer: int) -> LayerTensors:
    prefix = names.layer.format(layer=layer)
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    attention_size = decoder.qkv_sizes[0]

    def norm(name: str, size: int, *, is_there: bool) -> TensorShape | None:
        return _weight(prefix + name, size) if is_there else None

    def linear(
        parts: tuple[str, ...], sizes: tuple[int, ...], num_inputs: int, *, has_bias: bool
    ) -> LinearTensors:
        return _linear(prefix, parts, sizes, num_inputs, has_bias=has_bias)

    has_mlp_bias, has_sandwich = decoder.has_mlp_bias, decoder.has_sandwich_norms
    return LayerTensors(
        input_norm=_weight(prefix + names.input_norm, hidden),
        qkv=linear(names.qkv, decoder.qkv_sizes, hidden, has_bias=decoder.has_qkv_bias),
        q_norm=norm(names.q_norm, decoder.head_size, is_there=decoder.has_qk_norm),
        k_norm=norm(names.k_norm, decoder.head_size, is_there=decoder.has_qk_norm),
        output=linear((names.output,), (hidden,), attention_size, has_bias=decoder.has_output_bias),
        attention_output_norm=norm(names.attention_output_norm, hidden, is_there=has_sandwich),
        mlp_norm=_weight(prefix + names.mlp_norm, hidden),
        gate_up=linear(names.gate_up, (inner, inner), hidden, has_bias=has_mlp_bias),
        down=linear((names.down,), (hidden,), inner, has_bias=has_mlp_bias),
        mlp_output_norm=norm(names.mlp_output_norm, hidden, is_there=has_sandwich),
    )


def _linear(
    prefix: str, parts: tuple[str, ...], sizes: tuple[int, ...], num_inputs: int, *, has_bias: bool
) -> LinearTensors:
    """Tensors of one linear layer. A single part holds all `sizes` at once."""
    if len(parts) == 1:
        sizes = (sum(sizes),)
    named = list(zip(parts, sizes, strict=True))
    biases = [TensorShape(name=f"{prefix}{part}.bias", shape=(size,)) for part, size in named]
    return LinearTensors(
        weights=tuple(_weight(prefix + part, size, num_inputs) for part, size in named),
        biases=tuple(biases) if has_bias else (),
    )


def _weight(name: str, *shape: int) -> TensorShape:
    return TensorShape(name=f"{name}.weight", shape=shape)
