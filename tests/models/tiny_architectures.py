"""Tiny random models of every causal-LM architecture that transformers knows.

    from tiny_architectures import causal_architectures, make_tiny_architecture
    model = make_tiny_architecture("gpt_oss")

A default config is shrunk field by field, by the names that configs use for the same thing; windows,
chunks and top-k are shorter than the prompts, so that a wrong mask changes tokens.
"""

from __future__ import annotations

import zlib
from typing import Any

VOCAB_SIZE = 512
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE = 64, 4, 2, 16

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "dim": HIDDEN, "emb_dim": HIDDEN,
    "embedding_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB_SIZE, "embed_dim": HIDDEN,
    "intermediate_size": 112, "n_inner": 112, "ffn_dim": 112, "decoder_ffn_dim": 112,
    "encoder_ffn_dim": 112, "d_inner": 112, "d_ff": 112, "ffn_hidden_size": 112, "dff": 112,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "feed_forward_size": 112,
    "shared_intermediate_size": 48, "mlp_intermediate_size": 112, "intermediate_size_mlp": 112,
    "moe_shared_expert_intermediate_size": 48, "expert_ffn_hidden_size": 48,
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_attention_heads": HEADS,
    "num_decoder_attention_heads": HEADS, "num_encoder_attention_heads": HEADS,
    "attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "num_kv_heads": KV_HEADS, "n_head_kv": KV_HEADS,
    "head_dim": HEAD_SIZE, "d_kv": HEAD_SIZE, "kv_channels": HEAD_SIZE, "d_head": HEAD_SIZE,
    "attention_head_dim": HEAD_SIZE, "global_head_dim": 2 * HEAD_SIZE, "rotary_dim": 8,
    "swa_head_dim": HEAD_SIZE, "v_head_dim": HEAD_SIZE, "qk_nope_head_dim": HEAD_SIZE,
    "qk_rope_head_dim": 8, "qk_head_dim": 24, "q_lora_rank": 32, "kv_lora_rank": 32,
    "index_head_dim": HEAD_SIZE, "index_n_heads": 2, "index_topk": 16, "o_lora_rank": 32,
    "num_experts": 8, "n_routed_experts": 8, "num_local_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "top_k": 2, "moe_top_k": 2, "num_experts_per_token": 2,
    "moe_topk": 2, "top_k_experts": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "expert_layer_period": 2,
    "zero_expert_num": 2, "first_k_dense_replace": 1,
    "sliding_window": 32, "attention_window": 32, "window_size": 32, "local_attention": 32,
    "attention_chunk_size": 64, "chunk_size": 16, "mamba_chunk_size": 16, "attention_window_size": 32,
    "state_size": 16, "mamba_d_state": 16, "ssm_state_size": 16, "mamba_d_conv": 4,
    "time_step_rank": 8, "mamba_dt_rank": 8, "lru_width": HIDDEN, "conv_L_cache": 3,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_conv_kernel_dim": 4, "block_dim": HIDDEN,
    "block_ff_dim": 112, "conv_dim": HIDDEN,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512,
    "max_sequence_length": 512, "seq_length": 512,
    "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "activation_dropout": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "layerdrop": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "decoder_layerdrop": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "is_decoder": True,
    "decoder_start_token_id": 0, "use_mamba_kernels": False, "scale_embedding": False,
}  # fmt: skip
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
_MAMBA2 = {"mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}

SPECIAL: dict[str, dict[str, Any]] = {
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "nemo_speechlm": {"word_timestamp_config": {"blank_token_id": VOCAB_SIZE - 1}},
    "kyutai_speech_to_text": {
        "num_codebooks": 2, "codebook_vocab_size": 65, "audio_bos_token_id": 64,
        "audio_pad_token_id": VOCAB_SIZE + 2 * 65, "codec_config": {"upsample_groups": 64},
    },
    "t5gemma2": {"encoder": {"text_config": {
        "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB_SIZE,
        "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1,
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16,
    }, "vision_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }, "image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502}},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16},
    "bamba": {**_MAMBA2, "attn_layer_indices": [1], "num_hidden_layers": 2},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},
    "granitemoehybrid": {
        **_MAMBA2, "layer_types": ["mamba", "attention"], "num_hidden_layers": 2,
        "position_embedding_type": "rope",
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "expand": 2,
        "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3,
        "mamba_hidden_act": "silu",
    },
    "zamba2": {
        "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_expand": 2,
        "num_mem_blocks": 1, "use_mem_rope": True, "attention_head_dim": 32, "adapter_rank": 8,
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
        "attention_hidden_size": 128,
    },
    "zamba": {
        "n_mamba_heads": 2, "num_hidden_layers": 4, "attention_head_dim": 32,
        # Two hybrids: transformers cannot tie the shared one of a single layer.
        "attention_hidden_size": 128, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_key_value_heads": 4,
    },
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
    "xlstm": {"num_heads": 2, "qk_dim_factor": 0.5, "chunk_size": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 112, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "qwen4_exp": {
        "indexer_budget": 16, "indexer_compress_ratio": 4, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": HEAD_SIZE,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "bailing_hybrid": {"num_expert_group": 1, "topk_group": 1, "layer_group_size": 2},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "mpt": {"expansion_ratio": 2},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16}, "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "zaya": {"num_experts_per_tok": 1}, "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "reformer": {
        "attn_layers": ["local", "lsh"], "axial_pos_embds": False, "num_buckets": 4,
        "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "attention_head_size": 16,
        "hash_seed": 0,
    },
    "phi3": {"original_max_position_embeddings": 512},
    "xlnet": {"n_layer": 2, "d_inner": 112}, "xmod": {"default_language": "en_XX"},
    "ctrl": {"n_layer": 2, "dff": 112},
    "xlm": {"n_layers": 2, "causal": True, "emb_dim": 64, "n_heads": 4},
}  # fmt: skip

_UNSETTABLE = {
    "mpt": ("attn_config", "attn_pdrop"),
    "xlnet": ("max_position_embeddings",),
    "prophetnet": ("num_hidden_layers",),
}
"""Fields that a config has and does not take."""


def causal_architectures() -> list[str]:
    """The model types of transformers' causal-LM mapping, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def make_tiny_architecture(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of an architecture, in float32; `changes` are fields of its config."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter, seed))
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    model.generation_config.do_sample = False
    return model


def tiny_config(model_type: str) -> Any:
    """The shrunk default config of an architecture."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type)
    settings = shrunk(default, model_type)
    for name, value in vars(default).items():
        if name in _UNSETTABLE.get(model_type, ()):
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            asked = settings.get(name, {})
            settings[name] = {
                **shrunk(value, value.model_type), **asked, "model_type": value.model_type
            }  # fmt: skip
    return AutoConfig.for_model(model_type, **settings)


def shrunk(default: Any, model_type: str) -> dict[str, Any]:
    """What is set of a default config for a model of its type to be tiny."""
    names = {name for name in dir(default) if not name.startswith("_")}
    mapped = set(getattr(default, "attribute_map", {}))
    settings = {
        name: value
        for name, value in _SIZES.items()
        if name in names and name not in mapped and _is_same_kind(default, name, value)
    }
    layers = _num_layers(default)
    for name in _LAYER_COUNTS:
        if name in names and name not in mapped:
            settings[name] = layers
    types = _plain(default, "layer_types")
    if isinstance(types, (list, tuple)) and "layer_types" in default.to_dict():
        kinds = list(dict.fromkeys(types))
        settings["layer_types"] = (kinds * layers)[:layers]
    for name in ("mlp_layer_types", "moe_layers", "no_rope_layers", "layers_block_type"):
        value = _plain(default, name)
        if isinstance(value, (list, tuple)) and len(value) > layers and name in default.to_dict():
            settings[name] = [*value[: layers - 1], value[-1]]
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        settings |= {"num_key_value_heads": HEADS, "head_dim": settings["qk_rope_head_dim"]}
    if "num_kv_shared_layers" in names:
        settings["num_kv_shared_layers"] = 0
    settings.update(SPECIAL.get(model_type.removesuffix("_text"), {}))
    settings.update(SPECIAL.get(model_type, {}))
    for name in _UNSETTABLE.get(model_type, ()):
        settings.pop(name, None)
    return settings


def _is_same_kind(default: Any, name: str, value: Any) -> bool:
    """Whether a field is one number that the default sets; flags and lists stay as they are."""
    declared = getattr(type(default), name, None)
    if isinstance(declared, property) and declared.fset is None:
        return False
    present = _plain(default, name)
    if name == "is_decoder":
        return True
    if name.endswith("token_id"):
        return True
    if name in ("num_key_value_heads", "head_dim", "n_head_kv"):
        return present is not None
    if isinstance(present, bool):
        return isinstance(value, bool)
    return isinstance(present, (int, float))


def _num_layers(default: Any) -> int:
    types = _plain(default, "layer_types")
    kinds = len(set(types)) if isinstance(types, (list, tuple)) else 1
    return max(2, kinds)


def _plain(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some configs raise for what differs between layers
        return None


def random_weight(name: str, parameter: Any, seed: int) -> Any:
    """Weights by the role that a parameter's name and shape tell."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    noise = torch.randn(parameter.shape, generator=generator)
    lowered = name.lower()
    if any(part in lowered for part in ("a_log", "dt_bias", "time_decay", "time_first", ".d")) and (
        parameter.ndim <= 2 and "dense" not in lowered and "down" not in lowered
        and lowered.rsplit(".", 1)[-1] in ("a_log", "dt_bias", "d", "time_decay", "time_first")
    ):  # fmt: skip
        return 0.5 * noise
    if parameter.ndim <= 1:
        if name.endswith("bias"):
            return 0.3 * noise
        weight = 1.0 + 0.2 * noise
        is_last = any(p in lowered for p in ("final", "ln_f", ".norm.weight", "norm_f"))
        if is_last and "layers." not in lowered and ".h." not in lowered:
            weight *= torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1.0
        return weight
    if "embed" in lowered or "wte" in lowered or "wpe" in lowered:
        return noise * 0.7
    gain = 1.4 * 1.4 if any(p in lowered for p in ("q_proj", "k_proj", "query", "key")) else 1.4
    return noise * (gain / parameter.shape[-1] ** 0.5)
