"""Mistral: Llama without biases; all layers slide, or none."""

from __future__ import annotations

from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.reading import read_decoder
from quire.core.models.families.registry import register_family


def describe(config: Any) -> DecoderSpec:
    """A `MistralConfig`."""
    windows = (config.sliding_window,) * config.num_hidden_layers
    return read_decoder(config, layer_windows=windows)


def register() -> None:
    """Adds the family to the table."""
    register_family("MistralForCausalLM", describe=describe, model_types=("mistral",))
