"""Qwen 2 and 2.5: Llama with biases on query, key and value; some layers may slide."""

from __future__ import annotations

from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.reading import read_decoder, read_windows
from quire.core.models.families.registry import register_family


def describe(config: Any) -> DecoderSpec:
    """A `Qwen2Config`."""
    return read_decoder(config, layer_windows=read_windows(config), has_qkv_bias=True)


def register() -> None:
    """Adds the family to the table."""
    register_family("Qwen2ForCausalLM", describe=describe, model_types=("qwen2",))
