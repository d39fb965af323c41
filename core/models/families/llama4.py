"""Llama 4 (text): chunked layers that rotate, full ones that do not, inputs weighed for experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.core.interface.experts import RoutingSpec
from quire.core.models.decoder_spec import DecoderSpec, MixtureSpec, TemperatureSpec
from quire.core.models.families.reading import read_activation, read_decoder, unsupported
from quire.core.models.families.registry import register_family
from quire.core.models.weights.weight_layout import ExpertNames, WeightNames, standard_name

_NAMES = WeightNames(
    gate_up=("feed_forward.gate_proj", "feed_forward.up_proj"),
    down="feed_forward.down_proj",
    experts=ExpertNames(
        router="feed_forward.router",
        merged=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        shared="feed_forward.shared_expert",
    ),
)
_VISION = ("vision_model.", "multi_modal_projector.")
_LAYER_TYPES = ("chunked_attention", "full_attention")


def describe(config: Any) -> DecoderSpec:
    """A `Llama4TextConfig`."""
    rotated = config.no_rope_layers[: config.num_hidden_layers]
    has_temperature = config.attn_temperature_tuning and not all(rotated)
    return read_decoder(
        config,
        intermediate_size=config.intermediate_size_mlp,
        layer_windows=_read_chunks(config),
        are_windows_chunks=True,
        # A one says that the layer rotates, whatever the field's name says.
        layer_ropes=tuple(0 if is_rotated else None for is_rotated in rotated),
        is_rope_interleaved=True,
        has_rotated_norm=config.use_qk_norm,
        temperature=TemperatureSpec(floor=config.floor_scale, scale=config.attn_scale)
        if has_temperature
        else None,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        mixture=_read_mixture(config),
    )


def _read_chunks(config: Any) -> tuple[int | None, ...]:
    """The chunk of each layer; None: it sees everything."""
    strange = sorted(set(config.layer_types) - set(_LAYER_TYPES))
    if strange:
        raise unsupported("attention", f"layers of {strange[0]!r}", ", ".join(_LAYER_TYPES))
    chunk = config.attention_chunk_size
    if chunk is None and "chunked_attention" in config.layer_types:
        raise unsupported("attention", "chunked layers without attention_chunk_size", "a length")
    return tuple(chunk if kind == "chunked_attention" else None for kind in config.layer_types)


def _read_mixture(config: Any) -> MixtureSpec | None:
    layers = frozenset(config.moe_layers) & frozenset(range(config.num_hidden_layers))
    if not layers:
        return None
    return MixtureSpec(
        layers=layers,
        routing=RoutingSpec(
            num_experts=config.num_local_experts,
            num_chosen=config.num_experts_per_tok,
            score="sigmoid",
            is_renormalised=False,
        ),
        intermediate_size=config.intermediate_size,
        activation=read_activation(config.hidden_act),
        shared_size=config.intermediate_size,
        weighs_input=True,
    )


def describe_multimodal(config: Any) -> DecoderSpec:
    """The text part of a `Llama4Config`."""
    decoder = describe(config.text_config)
    return replace(decoder, architecture="Llama4ForConditionalGeneration")


def text_name(name: str) -> str | None:
    """A multimodal checkpoint's name as the text model has it; None for what sees images."""
    if name.startswith(_VISION):
        return None
    return standard_name(name.removeprefix("language_model."))


def register() -> None:
    """Adds the text model, and the multimodal one for prompts of text alone."""
    register_family(
        "Llama4ForCausalLM", describe=describe, names=_NAMES, model_types=("llama4_text",)
    )
    register_family(
        "Llama4ForConditionalGeneration",
        describe=describe_multimodal,
        names=replace(_NAMES, rename=text_name),
        model_types=("llama4",),
    )
