"""Families whose MLPs are mixtures of experts: Mixtral, Qwen 2 and 3 MoE, OLMoE, GPT-OSS, GLM 4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from quire.core.interface.experts import RoutingSpec
from quire.core.models.decoder_spec import DecoderSpec, MixtureSpec
from quire.core.models.families.reading import (
    read_activation,
    read_decoder,
    read_windows,
    unsupported,
)
from quire.core.models.families.registry import register_family
from quire.core.models.weights.weight_layout import ExpertNames, WeightNames

_MIXTRAL_NAMES = WeightNames(
    experts=ExpertNames(
        router="block_sparse_moe.gate",
        gate="block_sparse_moe.experts.{expert}.w1",
        up="block_sparse_moe.experts.{expert}.w3",
        down="block_sparse_moe.experts.{expert}.w2",
    )
)
QWEN2_MOE_NAMES = WeightNames(experts=ExpertNames(shared="mlp.shared_expert"))
"""Of Qwen 2 MoE, and of its kin that share an expert."""
_GPT_OSS_NAMES = WeightNames(
    experts=ExpertNames(
        router="mlp.router",
        merged=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        is_interleaved=True,
    )
)


def describe_mixtral(config: Any) -> DecoderSpec:
    """A `MixtralConfig`."""
    mixture = MixtureSpec(
        layers=frozenset(range(config.num_hidden_layers)),
        routing=RoutingSpec(
            num_experts=config.num_local_experts, num_chosen=config.num_experts_per_tok
        ),
        intermediate_size=config.intermediate_size,
        activation=read_activation(config.hidden_act),
    )
    windows = (config.sliding_window,) * config.num_hidden_layers
    return read_decoder(config, layer_windows=windows, mixture=mixture)


def describe_qwen2_moe(config: Any) -> DecoderSpec:
    """A `Qwen2MoeConfig`."""
    return read_decoder(
        config,
        layer_windows=read_windows(config),
        has_qkv_bias=config.qkv_bias,
        mixture=qwen_mixture(
            config, shared_size=config.shared_expert_intermediate_size, has_shared_gate=True
        ),
    )


def describe_qwen3_moe(config: Any) -> DecoderSpec:
    """A `Qwen3MoeConfig`."""
    windows = (config.sliding_window,) * config.num_hidden_layers
    return read_decoder(
        config,
        layer_windows=windows,
        has_qk_norm=True,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        mixture=qwen_mixture(config),
    )


def qwen_mixture(config: Any, **differences: Any) -> MixtureSpec | None:
    """Every so-many-th layer is sparse, but for those that the config names."""
    layers = frozenset(
        layer
        for layer in range(config.num_hidden_layers)
        if layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
    )
    num_experts = config.num_experts
    if not layers or not num_experts:
        return None
    return MixtureSpec(
        layers=layers,
        routing=RoutingSpec(
            num_experts=num_experts,
            num_chosen=config.num_experts_per_tok,
            is_renormalised=config.norm_topk_prob,
        ),
        intermediate_size=config.moe_intermediate_size,
        activation=read_activation(config.hidden_act),
        **differences,
    )


def describe_olmoe(config: Any) -> DecoderSpec:
    """An `OlmoeConfig`."""
    if config.clip_qkv is not None:
        raise unsupported("clip_qkv", f"queries and keys clipped at {config.clip_qkv}", "none")
    mixture = MixtureSpec(
        layers=frozenset(range(config.num_hidden_layers)),
        routing=RoutingSpec(
            num_experts=config.num_experts,
            num_chosen=config.num_experts_per_tok,
            is_renormalised=config.norm_topk_prob,
        ),
        intermediate_size=config.intermediate_size,
        activation=read_activation(config.hidden_act),
    )
    return read_decoder(
        config,
        has_qk_norm=True,
        is_qk_norm_joint=True,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        mixture=mixture,
    )


def describe_gpt_oss(config: Any) -> DecoderSpec:
    """A `GptOssConfig`: sinks, and an activation of its own."""
    mixture = MixtureSpec(
        layers=frozenset(range(config.num_hidden_layers)),
        routing=RoutingSpec(
            num_experts=config.num_local_experts, num_chosen=config.num_experts_per_tok
        ),
        intermediate_size=config.intermediate_size,
        activation="clamped_swiglu",
        # Of the published models, where the configuration of an older transformers says nothing.
        alpha=getattr(config, "swiglu_alpha", 1.702),
        limit=getattr(config, "swiglu_limit", 7.0),
        has_router_bias=True,
        has_expert_bias=True,
    )
    return read_decoder(
        config,
        layer_windows=read_windows(config),
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        has_sinks=True,
        mixture=mixture,
    )


def describe_glm4_moe(config: Any) -> DecoderSpec:
    """A `Glm4MoeConfig`: routed as DeepSeek-V3, with ordinary heads."""
    return read_decoder(
        config,
        has_qk_norm=config.use_qk_norm,
        has_qkv_bias=config.attention_bias,
        mixture=corrected_mixture(
            config, range(config.first_k_dense_replace, config.num_hidden_layers)
        ),
    )


def corrected_mixture(config: Any, layers: Iterable[int]) -> MixtureSpec:
    """Sigmoid scores, groups by their two best, and a bias that chooses and does not weigh."""
    return MixtureSpec(
        layers=frozenset(layers),
        routing=RoutingSpec(
            num_experts=config.n_routed_experts,
            num_chosen=config.num_experts_per_tok,
            score="sigmoid",
            is_renormalised=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            num_groups=config.n_group,
            num_kept_groups=config.topk_group,
            group_score="top2",
        ),
        intermediate_size=config.moe_intermediate_size,
        activation=read_activation(config.hidden_act),
        shared_size=config.moe_intermediate_size * (config.n_shared_experts or 0),
        has_correction_bias=True,
    )


def register() -> None:
    """Adds the families to the table."""
    register_family(
        "MixtralForCausalLM",
        describe=describe_mixtral,
        names=_MIXTRAL_NAMES,
        model_types=("mixtral",),
    )
    register_family(
        "Qwen2MoeForCausalLM",
        describe=describe_qwen2_moe,
        names=QWEN2_MOE_NAMES,
        model_types=("qwen2_moe",),
    )
    register_family("Qwen3MoeForCausalLM", describe=describe_qwen3_moe, model_types=("qwen3_moe",))
    register_family("OlmoeForCausalLM", describe=describe_olmoe, model_types=("olmoe",))
    register_family(
        "GptOssForCausalLM",
        describe=describe_gpt_oss,
        names=_GPT_OSS_NAMES,
        model_types=("gpt_oss",),
    )
    register_family("Glm4MoeForCausalLM", describe=describe_glm4_moe, model_types=("glm4_moe",))
