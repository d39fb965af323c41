"""Gemma 2: sandwich norms stored as w of 1 + w, scaled embeddings, soft caps, sliding layers."""

from __future__ import annotations

from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.reading import (
    read_activation,
    read_decoder,
    read_windows,
    refuse_bidirectional,
)
from quire.core.models.families.registry import register_family
from quire.core.models.weights.weight_layout import WeightNames

GEMMA_NAMES = WeightNames(mlp_norm="pre_feedforward_layernorm")


def describe(config: Any) -> DecoderSpec:
    """A `Gemma2Config`."""
    return describe_gemma(config, attention_soft_cap=config.attn_logit_softcapping)


def describe_gemma(config: Any, **differences: Any) -> DecoderSpec:
    """What Gemma 2 and Gemma 3 have in common."""
    refuse_bidirectional(config)
    return read_decoder(
        config,
        layer_windows=read_windows(config),
        attention_scale=config.query_pre_attn_scalar**-0.5,
        activation=read_activation(config.hidden_activation),
        norm_offset=1.0,
        embedding_scale=config.hidden_size**0.5,
        logit_soft_cap=config.final_logit_softcapping,
        has_sandwich_norms=True,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        **differences,
    )


def register() -> None:
    """Adds the family to the table."""
    register_family(
        "Gemma2ForCausalLM", describe=describe, names=GEMMA_NAMES, model_types=("gemma2",)
    )
