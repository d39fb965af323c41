"""Phi-3 and Phi-4: Llama with merged projections in the checkpoint, partial rotary and longrope."""

from __future__ import annotations

from typing import Any

from quire.core.models.decoder_spec import DecoderSpec
from quire.core.models.families.reading import read_decoder
from quire.core.models.families.registry import register_family
from quire.core.models.weights.weight_layout import WeightNames

_NAMES = WeightNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))


def describe(config: Any) -> DecoderSpec:
    """A `Phi3Config`."""
    windows = (config.sliding_window,) * config.num_hidden_layers
    return read_decoder(config, layer_windows=windows)


def register() -> None:
    """Adds the family to the table."""
    register_family("Phi3ForCausalLM", describe=describe, names=_NAMES, model_types=("phi3",))
