"""Llama 1 to 3 and what shares their code: pre-norm, SwiGLU, grouped heads, optional biases."""

from __future__ import annotations

from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.reading import read_decoder
from quire.core.models.families.registry import register_family


def describe(config: Any) -> DecoderSpec:
    """A `LlamaConfig`."""
    return read_decoder(
        config,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        has_mlp_bias=config.mlp_bias,
    )


def register() -> None:
    """Adds the family to the table."""
    register_family("LlamaForCausalLM", describe=describe, model_types=("llama",))
