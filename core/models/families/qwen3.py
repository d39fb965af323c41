"""Qwen 3 (dense): queries and keys are normalised a head; the size of a head is free."""

from __future__ import annotations

from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.reading import read_decoder, read_windows
from quire.core.models.families.registry import register_family


def describe(config: Any) -> DecoderSpec:
    """A `Qwen3Config`."""
    return read_decoder(
        config,
        layer_windows=read_windows(config),
        has_qk_norm=True,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
    )


def register() -> None:
    """Adds the family to the table."""
    register_family("Qwen3ForCausalLM", describe=describe, model_types=("qwen3",))
