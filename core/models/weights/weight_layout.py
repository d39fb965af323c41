"""Which tensors a checkpoint of a decoder holds, by name and shape, and how they merge.

Torch-free: `describe_model` counts parameters from it, the loader reads and checks files by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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
class LatentNames:
    """How a family calls the projections of latent attention, in a layer."""

    q: str = "self_attn.q_proj"
    q_down: str = "self_attn.q_a_proj"
    q_norm: str = "self_attn.q_a_layernorm"
    q_up: str = "self_attn.q_b_proj"
    kv_down: str = "self_attn.kv_a_proj_with_mqa"
    kv_norm: str = "self_attn.kv_a_layernorm"
    kv_up: str = "self_attn.kv_b_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """How a family calls the tensors of a mixture, in a layer."""

    router: str = "mlp.gate"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    gate: str = "mlp.experts.{expert}.gate_proj"
    up: str = "mlp.experts.{expert}.up_proj"
    down: str = "mlp.experts.{expert}.down_proj"
    merged: tuple[str, str] | None = None
    """gate_up [E, H, 2I] and down [E, I, H] of all experts, where they are merged so."""
    is_transposed: bool = True
    """The merged ones are as said; else gate_up [E, 2I, H] and down [E, H, I]."""
    is_interleaved: bool = False
    """The merged gate_up has gate and up in turn, not one after the other."""
    shared: str = "mlp.shared_experts"
    """Before `.gate_proj`, `.up_proj` and `.down_proj`."""
    shared_gate: str = "mlp.shared_expert_gate"


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
    sinks: str = "self_attn.sinks"
    latent: LatentNames = field(default_factory=LatentNames)
    experts: ExpertNames = field(default_factory=ExpertNames)
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
class HeadTensors:
    """Attention with keys and values of its own heads."""

    qkv: LinearTensors
    q_norm: TensorShape | None
    k_norm: TensorShape | None
    sinks: TensorShape | None

    def __iter__(self) -> Iterator[TensorShape]:
        yield from self.qkv
        yield from _present(self.q_norm, self.k_norm, self.sinks)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTensors:
    """Attention over a latent."""

    q_down: LinearTensors | None
    q_norm: TensorShape | None
    q_up: LinearTensors
    """From the hidden states, where there is no `q_down`."""
    kv_down: LinearTensors
    kv_norm: TensorShape
    kv_up: TensorShape
    """[Hq * (plain + value), R]."""

    def __iter__(self) -> Iterator[TensorShape]:
        for linear in (self.q_down, self.q_up, self.kv_down):
            yield from linear or ()
        yield from _present(self.q_norm, self.kv_norm, self.kv_up)


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensors:
    """An MLP for every token."""

    gate_up: LinearTensors
    down: LinearTensors

    def __iter__(self) -> Iterator[TensorShape]:
        yield from self.gate_up
        yield from self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureTensors:
    """A mixture of experts."""

    router: LinearTensors
    correction_bias: TensorShape | None
    gate_up: tuple[TensorShape, ...]
    """Gate and up of each expert in turn, [I, H] each; or one tensor as `ExpertNames` says."""
    down: tuple[TensorShape, ...]
    """Of each expert [H, I]; or one tensor."""
    gate_up_bias: TensorShape | None
    down_bias: TensorShape | None
    is_merged: bool
    is_transposed: bool
    is_interleaved: bool
    shared: DenseTensors | None
    shared_gate: LinearTensors | None

    def __iter__(self) -> Iterator[TensorShape]:
        yield from self.router
        yield from self.gate_up
        yield from self.down
        yield from self.shared or ()
        yield from self.shared_gate or ()
        yield from _present(self.correction_bias, self.gate_up_bias, self.down_bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTensors:
    """The tensors of one layer."""

    input_norm: TensorShape
    attention: HeadTensors | LatentTensors
    output: LinearTensors
    attention_output_norm: TensorShape | None
    mlp_norm: TensorShape
    mlp: DenseTensors | MixtureTensors
    mlp_output_norm: TensorShape | None

    def __iter__(self) -> Iterator[TensorShape]:
        yield from self.attention
        yield from self.output
        yield from self.mlp
        yield from _present(
            self.input_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm
        )


def _present(*tensors: TensorShape | None) -> Iterator[TensorShape]:
    return (tensor for tensor in tensors if tensor is not None)


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
    hidden = decoder.hidden_size

    def norm(name: str) -> TensorShape | None:
        return _weight(prefix + name, hidden) if decoder.has_sandwich_norms else None

    return LayerTensors(
        input_norm=_weight(prefix + names.input_norm, hidden),
        attention=_lay_out_latent(decoder, names.latent, prefix)
        if decoder.latent
        else _lay_out_heads(decoder, names, prefix),
        output=_linear(
            prefix,
            (names.output,),
            (hidden,),
            decoder.attention_size,
            has_bias=decoder.has_output_bias,
        ),
        attention_output_norm=norm(names.attention_output_norm),
        mlp_norm=_weight(prefix + names.mlp_norm, hidden),
        mlp=_lay_out_mixture(decoder, names.experts, prefix)
        if decoder.is_sparse(layer)
        else _lay_out_dense(decoder, names, prefix),
        mlp_output_norm=norm(names.mlp_output_norm),
    )


def _lay_out_heads(decoder: DecoderSpec, names: WeightNames, prefix: str) -> HeadTensors:
    q_size, k_size = decoder.qk_norm_sizes
    has_norm, has_sinks = decoder.has_qk_norm, decoder.has_sinks
    sinks = TensorShape(name=prefix + names.sinks, shape=(decoder.num_heads,))
    return HeadTensors(
        qkv=_linear(
            prefix,
            names.qkv,
            decoder.qkv_sizes,
            decoder.hidden_size,
            has_bias=decoder.has_qkv_bias,
        ),
        q_norm=_weight(prefix + names.q_norm, q_size) if has_norm else None,
        k_norm=_weight(prefix + names.k_norm, k_size) if has_norm else None,
        sinks=sinks if has_sinks else None,
    )


def _lay_out_latent(decoder: DecoderSpec, names: LatentNames, prefix: str) -> LatentTensors:
    latent = decoder.latent
    assert latent is not None
    hidden, heads, has_bias = decoder.hidden_size, decoder.num_heads, decoder.has_qkv_bias

    def linear(name: str, size: int, num_inputs: int, *, has_bias: bool = False) -> LinearTensors:
        return _linear(prefix, (name,), (size,), num_inputs, has_bias=has_bias)

    q_size = heads * (latent.plain_size + latent.rotary_size)
    kv_size = heads * (latent.plain_size + latent.value_size)
    rank = latent.q_rank
    return LatentTensors(
        q_down=linear(names.q_down, rank, hidden, has_bias=has_bias) if rank else None,
        q_norm=_weight(prefix + names.q_norm, rank) if rank else None,
        q_up=linear(names.q_up, q_size, rank) if rank else linear(names.q, q_size, hidden),
        kv_down=linear(names.kv_down, latent.cached_size, hidden, has_bias=has_bias),
        kv_norm=_weight(prefix + names.kv_norm, latent.kv_rank),
        kv_up=_weight(prefix + names.kv_up, kv_size, latent.kv_rank),
    )


def _lay_out_dense(decoder: DecoderSpec, names: WeightNames, prefix: str) -> DenseTensors:
    hidden, inner, has_bias = decoder.hidden_size, decoder.intermediate_size, decoder.has_mlp_bias
    return DenseTensors(
        gate_up=_linear(prefix, names.gate_up, (inner, inner), hidden, has_bias=has_bias),
        down=_linear(prefix, (names.down,), (hidden,), inner, has_bias=has_bias),
    )


def _lay_out_mixture(decoder: DecoderSpec, names: ExpertNames, prefix: str) -> MixtureTensors:
    mixture = decoder.mixture
    assert mixture is not None
    hidden, inner, count = (
        decoder.hidden_size, mixture.intermediate_size, mixture.routing.num_experts
    )  # fmt: skip
    gate_up, down = _lay_out_experts(names, prefix, count, hidden, inner)

    def bias(merged: int, *shape: int) -> TensorShape | None:
        if not mixture.has_expert_bias or names.merged is None:
            return None
        return TensorShape(name=f"{prefix}{names.merged[merged]}_bias", shape=shape)

    router = _linear(prefix, (names.router,), (count,), hidden, has_bias=mixture.has_router_bias)
    correction = TensorShape(name=prefix + names.correction_bias, shape=(count,))
    gate = _linear(prefix, (names.shared_gate,), (1,), hidden, has_bias=False)
    return MixtureTensors(
        router=router,
        correction_bias=correction if mixture.has_correction_bias else None,
        gate_up=gate_up,
        down=down,
        gate_up_bias=bias(0, count, 2 * inner),
        down_bias=bias(1, count, hidden),
        is_merged=names.merged is not None,
        is_transposed=names.is_transposed,
        is_interleaved=names.is_interleaved,
        shared=_lay_out_shared(names, prefix, hidden, mixture.shared_size),
        shared_gate=gate if mixture.has_shared_gate else None,
    )


def _lay_out_experts(
    names: ExpertNames, prefix: str, count: int, hidden: int, inner: int
) -> tuple[tuple[TensorShape, ...], tuple[TensorShape, ...]]:
    if names.merged is not None:
        shapes = (count, 2 * inner, hidden), (count, hidden, inner)
        if names.is_transposed:
            shapes = (count, hidden, 2 * inner), (count, inner, hidden)
        gate_up, down = (
            TensorShape(name=prefix + name, shape=shape)
            for name, shape in zip(names.merged, shapes, strict=True)
        )
        return (gate_up,), (down,)
    experts = range(count)
    return (
        tuple(
            _weight(prefix + name.format(expert=expert), inner, hidden)
            for expert in experts
            for name in (names.gate, names.up)
        ),
        tuple(_weight(prefix + names.down.format(expert=e), hidden, inner) for e in experts),
    )


def _lay_out_shared(
    names: ExpertNames, prefix: str, hidden: int, inner: int
) -> DenseTensors | None:
    if not inner:
        return None
    parts = (f"{names.shared}.gate_proj", f"{names.shared}.up_proj")
    return DenseTensors(
        gate_up=_linear(prefix, parts, (inner, inner), hidden, has_bias=False),
        down=_linear(prefix, (f"{names.shared}.down_proj",), (hidden,), inner, has_bias=False),
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
