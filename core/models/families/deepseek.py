"""DeepSeek V2 and V3: latent attention, and experts in groups beside one that all tokens share."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from quire.core.interface.experts import RoutingSpec
from quire.core.models.decoder_spec import DecoderSpec, LatentSpec, MixtureSpec
from quire.core.models.families.mixtures import corrected_mixture
from quire.core.models.families.reading import (
    read_activation,
    read_decoder,
    read_rope,
    unsupported,
)
from quire.core.models.families.registry import register_family


def describe_v2(config: Any) -> DecoderSpec:
    """A `DeepseekV2Config`."""
    sparse = range(config.first_k_dense_replace, config.num_hidden_layers)
    is_grouped = config.topk_method == "group_limited_greedy"
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        have = "greedy, group_limited_greedy"
        raise unsupported("topk_method", f"topk_method {config.topk_method!r}", have)
    mixture = MixtureSpec(
        layers=frozenset(sparse),
        routing=RoutingSpec(
            num_experts=config.n_routed_experts,
            num_chosen=config.num_experts_per_tok,
            is_renormalised=False,
            scale=config.routed_scaling_factor,
            num_groups=config.n_group if is_grouped else 1,
            num_kept_groups=config.topk_group if is_grouped else 1,
        ),
        intermediate_size=config.moe_intermediate_size,
        activation=read_activation(config.hidden_act),
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
    )
    return _describe(config, mixture=mixture, is_rope_interleaved=True)


def describe_v3(config: Any) -> DecoderSpec:
    """A `DeepseekV3Config`."""
    sparse = range(config.first_k_dense_replace, config.num_hidden_layers)
    return _describe(
        config,
        mixture=corrected_mixture(config, sparse),
        is_rope_interleaved=bool(config.rope_interleave),
    )


def _describe(config: Any, **differences: Any) -> DecoderSpec:
    latent = LatentSpec(
        kv_rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank,
        plain_size=config.qk_nope_head_dim,
        rotary_size=config.qk_rope_head_dim,
        value_size=config.v_head_dim,
    )
    rope = replace(read_rope(config, config.rope_parameters), head_size=config.qk_rope_head_dim)
    return read_decoder(
        config,
        ropes=(rope,),
        latent=latent,
        attention_scale=_scale(config.rope_parameters, latent),
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        **differences,
    )


def _scale(rope_parameters: dict[str, Any], latent: LatentSpec) -> float:
    """Grows with the stretching of the context, as training had it (Peng et al. 2023, YaRN)."""
    scale: float = (latent.plain_size + latent.rotary_size) ** -0.5
    weight = rope_parameters.get("mscale_all_dim", 0)
    if rope_parameters.get("rope_type", "default") == "default" or not weight:
        return scale
    factor = rope_parameters["factor"]
    stretch = 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    return scale * stretch * stretch


def register() -> None:
    """Adds the families to the table."""
    register_family("DeepseekV2ForCausalLM", describe=describe_v2, model_types=("deepseek_v2",))
    register_family("DeepseekV3ForCausalLM", describe=describe_v3, model_types=("deepseek_v3",))
