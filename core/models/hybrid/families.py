"""What each hybrid family says of itself in its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quire.core.interface.experts import RoutingSpec
from quire.core.models.decoder_spec import MixtureSpec
from quire.core.models.families.mixtures import QWEN2_MOE_NAMES, qwen_mixture
from quire.core.models.families.reading import read_activation, read_decoder, unsupported
from quire.core.models.hybrid.spec import HybridSpec
from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.state_space.spec import StateSpaceSpec
from quire.core.models.weights.weight_layout import standard_name

_TOWER = "model.visual."


def _rename_qwen(name: str) -> str | None:
    """As a text model has it, where a tower stands beside one."""
    text = "model.language_model."
    return standard_name(f"model.{name.removeprefix(text)}" if name.startswith(text) else name)


_QWEN_NAMES = replace(QWEN2_MOE_NAMES, rename=_rename_qwen)
_MERGED_QWEN_NAMES = replace(
    _QWEN_NAMES,
    experts=replace(
        _QWEN_NAMES.experts,
        merged=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        is_transposed=False,
    ),
)


def read_bamba(config: Any) -> HybridSpec:
    """Bamba: mixers of Mamba-2, and attention instead of them in some layers.

    Raises: UnsupportedError.
    """
    attending = _layers_of(config.layers_block_type, "full_attention")
    decoder = read_decoder(
        config,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        has_mlp_bias=config.mlp_bias,
    )
    return HybridSpec(
        decoder=decoder,
        mixer=_read_second_mixer(config, config.mamba_expand * config.hidden_size),
        attention_layers=attending,
        mixer_layers=_others(config, attending),
    )


def read_falcon_h1(config: Any) -> HybridSpec:
    """Falcon-H1: a mixer of Mamba-2 and attention side by side in every layer.

    Its multipliers are folded into the weights that they follow.

    Raises: UnsupportedError.
    """
    layers = tuple(range(config.num_hidden_layers))
    inner = config.mamba_d_ssm or config.mamba_expand * config.hidden_size
    decoder = read_decoder(
        config,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        has_mlp_bias=config.mlp_bias,
        embedding_scale=config.embedding_multiplier,
    )
    mixer = _read_second_mixer(
        config,
        inner,
        has_output_bias=config.projectors_bias,
        has_gated_norm=config.mamba_rms_norm,
        is_norm_before_gate=config.mamba_norm_before_gate,
    )
    return HybridSpec(
        decoder=decoder,
        mixer=mixer,
        attention_layers=layers,
        mixer_layers=layers,
        logit_scale=config.lm_head_multiplier,
        weight_scales=_falcon_scales(config, mixer),
    )


def read_jamba(config: Any) -> HybridSpec:
    """Jamba: mixers of Mamba, attention without positions in some layers, experts in some.

    Raises: UnsupportedError.
    """
    attending = _layers_of(config.layers_block_type, "attention")
    sparse = tuple(i for i, count in enumerate(config.layers_num_experts) if count > 1)
    routing = RoutingSpec(
        num_experts=config.num_experts,
        num_chosen=config.num_experts_per_tok,
        is_renormalised=False,
    )
    mixture = MixtureSpec(
        layers=frozenset(sparse), routing=routing, intermediate_size=config.intermediate_size
    )
    decoder = read_decoder(
        config,
        ropes=(),
        max_model_len=config.max_position_embeddings,
        mixture=mixture if sparse else None,
    )
    return HybridSpec(
        decoder=decoder,
        mixer=_read_first_mixer(config),
        attention_layers=attending,
        mixer_layers=_others(config, attending),
        has_rope=False,
    )


def read_qwen3_next(config: Any) -> HybridSpec:
    """Qwen3-Next: gated delta nets, gated attention in some layers, experts in some or all.

    Raises: UnsupportedError.
    """
    mixture = qwen_mixture(
        config, shared_size=config.shared_expert_intermediate_size, has_shared_gate=True
    )
    return _read_delta_hybrid(config, is_grouped=True, mixture=mixture)


def read_qwen3_5(config: Any) -> HybridSpec:
    """The dense texts of Qwen3.5, with a tower beside them or alone.

    As Qwen3-Next, with one MLP in each layer. Positions have three parts, which are equal in texts.
    Raises: UnsupportedError.
    """
    return _read_delta_hybrid(
        config.get_text_config(decoder=True),
        is_grouped=False,
        architecture=(config.architectures or [type(config).__name__])[0],
        has_tied_embeddings=config.tie_word_embeddings,
    )


def read_qwen3_5_moe(config: Any) -> HybridSpec:
    """The texts of Qwen3.5 with experts in each layer; as `read_qwen3_5`.

    Raises: UnsupportedError.
    """
    text = config.get_text_config(decoder=True)
    mixture = MixtureSpec(
        layers=frozenset(range(text.num_hidden_layers)),
        routing=RoutingSpec(num_experts=text.num_experts, num_chosen=text.num_experts_per_tok),
        intermediate_size=text.moe_intermediate_size,
        activation=read_activation(text.hidden_act),
        shared_size=text.shared_expert_intermediate_size,
        has_shared_gate=True,
    )
    return _read_delta_hybrid(
        text,
        is_grouped=False,
        architecture=(config.architectures or [type(config).__name__])[0],
        has_tied_embeddings=config.tie_word_embeddings,
        intermediate_size=text.moe_intermediate_size,
        mixture=mixture,
    )


def _read_delta_hybrid(config: Any, *, is_grouped: bool, **differences: Any) -> HybridSpec:
    attending = _layers_of(config.layer_types, "full_attention")
    decoder = read_decoder(
        config,
        norm_offset=1.0,
        has_qk_norm=True,
        has_attention_gate=True,
        has_qkv_bias=config.attention_bias,
        has_output_bias=config.attention_bias,
        **differences,
    )
    return HybridSpec(
        decoder=decoder,
        mixer=_read_delta_mixer(config, is_grouped=is_grouped),
        attention_layers=attending,
        mixer_layers=_others(config, attending),
        names=_QWEN_NAMES,
        merged_names=_MERGED_QWEN_NAMES,
        mixer_name="linear_attn.",
        ignored_prefixes=("mtp.", _TOWER),
    )


FAMILIES: dict[str, Callable[[Any], HybridSpec]] = {
    "BambaForCausalLM": read_bamba,
    "FalconH1ForCausalLM": read_falcon_h1,
    "JambaForCausalLM": read_jamba,
    "Qwen3NextForCausalLM": read_qwen3_next,
    "Qwen3_5ForCausalLM": read_qwen3_5,
    "Qwen3_5ForConditionalGeneration": read_qwen3_5,
    "Qwen3_5MoeForCausalLM": read_qwen3_5_moe,
    "Qwen3_5MoeForConditionalGeneration": read_qwen3_5_moe,
}
"""By the names in a config's `architectures`."""


def _layers_of(kinds: list[str], kind: str) -> tuple[int, ...]:
    return tuple(index for index, found in enumerate(kinds) if found == kind)


def _others(config: Any, attending: tuple[int, ...]) -> tuple[int, ...]:
    mixing = tuple(i for i in range(config.num_hidden_layers) if i not in attending)
    if not mixing or not attending:
        raise unsupported("layers", "layers of one kind alone", "attention and mixers together")
    return mixing


def _read_first_mixer(config: Any) -> StateSpaceSpec:
    return StateSpaceSpec(
        **_read_shared(config),
        inner_size=config.mamba_expand * config.hidden_size,
        num_heads=None,
        num_groups=1,
        rank=int(config.mamba_dt_rank),
        has_inner_norms=True,
    )


def _read_second_mixer(config: Any, inner_size: int, **differences: Any) -> StateSpaceSpec:
    limits = tuple(getattr(config, "time_step_limit", None) or (0.0, float("inf")))
    if limits != (0.0, float("inf")):
        raise unsupported("time_step_limit", f"time steps limited to {limits}", "no limit")
    return StateSpaceSpec(
        **_read_shared(config),
        inner_size=int(inner_size),
        num_heads=config.mamba_n_heads,
        num_groups=config.mamba_n_groups,
        rank=0,
        **differences,
    )


def _read_delta_mixer(config: Any, *, is_grouped: bool) -> DeltaSpec:
    if config.hidden_act not in ("silu", "swish"):
        raise unsupported("activation", f"activation {config.hidden_act!r}", "silu")
    return DeltaSpec(
        hidden_size=config.hidden_size,
        num_key_heads=config.linear_num_key_heads,
        num_value_heads=config.linear_num_value_heads,
        key_size=config.linear_key_head_dim,
        value_size=config.linear_value_head_dim,
        conv_width=config.linear_conv_kernel_dim,
        norm_eps=config.rms_norm_eps,
        is_grouped=is_grouped,
    )


def _read_shared(config: Any) -> dict[str, Any]:
    """Fields of a mixer that all have."""
    if config.hidden_act not in ("silu", "swish"):
        raise unsupported("activation", f"activation {config.hidden_act!r}", "silu")
    return {
        "architecture": (config.architectures or [type(config).__name__])[0],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "state_size": config.mamba_d_state,
        "conv_width": config.mamba_d_conv,
        "num_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "has_bias": config.mamba_proj_bias,
        "has_conv_bias": config.mamba_conv_bias,
        "has_tied_embeddings": config.tie_word_embeddings,
        "keeps_residual_in_float32": False,
    }


def _falcon_scales(config: Any, mixer: StateSpaceSpec) -> dict[str, tuple[float, ...]]:
    """Source: transformers' `FalconH1Mixer.mup_vector` and the multipliers of its layers."""
    shared = mixer.num_groups * mixer.state_size
    sizes = (mixer.inner_size, mixer.inner_size, shared, shared, mixer.num_heads or 0)
    rows = [m for m, n in zip(config.ssm_multipliers, sizes, strict=True) for _ in range(n)]
    gate, down = config.mlp_multipliers
    attention_in, key = config.attention_in_multiplier, config.key_multiplier
    scales = {
        "mamba.in_proj.weight": tuple(row * config.ssm_in_multiplier for row in rows),
        "mamba.in_proj.bias": tuple(rows),
        "self_attn.q_proj.weight": (attention_in,),
        "self_attn.k_proj.weight": (attention_in * key,),
        "self_attn.k_proj.bias": (key,),
        "self_attn.v_proj.weight": (attention_in,),
    }
    for name, scale in (
        ("mamba.out_proj", config.ssm_out_multiplier),
        ("self_attn.o_proj", config.attention_out_multiplier),
        ("feed_forward.gate_proj", gate),
        ("feed_forward.down_proj", down),
    ):
        scales |= {f"{name}.weight": (scale,), f"{name}.bias": (scale,)}
    return scales
