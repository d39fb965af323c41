"""Gemma 3 (text): Gemma 2 with q/k norm for soft caps, and a RoPE of its own where layers slide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.gemma2 import GEMMA_NAMES, describe_gemma
from quire.core.models.families.reading import read_rope
from quire.core.models.families.registry import register_family
from quire.core.models.weights.weight_layout import standard_name

_ROPE_ORDER = ("full_attention", "sliding_attention")
_VISION = ("vision_tower.", "multi_modal_projector.")


def describe(config: Any) -> DecoderSpec:
    """A `Gemma3TextConfig`."""
    ropes = tuple(read_rope(config, config.rope_parameters[kind]) for kind in _ROPE_ORDER)
    layer_ropes = tuple(_ROPE_ORDER.index(kind) for kind in config.layer_types)
    return describe_gemma(config, ropes=ropes, layer_ropes=layer_ropes, has_qk_norm=True)


def describe_multimodal(config: Any) -> DecoderSpec:
    """The text part of a `Gemma3Config`."""
    decoder = describe(config.text_config)
    return replace(decoder, architecture="Gemma3ForConditionalGeneration")


def text_name(name: str) -> str | None:
    """A multimodal checkpoint's name as the text model has it; None for what sees images."""
    bare = name.removeprefix("model.")
    if bare.startswith(_VISION):
        return None
    return standard_name(bare.removeprefix("language_model."))


def register() -> None:
    """Adds the text model, and the multimodal one for prompts of text alone."""
    register_family(
        "Gemma3ForCausalLM", describe=describe, names=GEMMA_NAMES, model_types=("gemma3_text",)
    )
    register_family(
        "Gemma3ForConditionalGeneration",
        describe=describe_multimodal,
        names=replace(GEMMA_NAMES, rename=text_name),
        model_types=("gemma3",),
    )
