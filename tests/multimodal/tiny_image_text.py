"""Tiny random models of every image-text-to-text architecture, for prompts of text alone.

from tiny_image_text import image_text_architectures, make_tiny_image_text
model = make_tiny_image_text("internvl")
"""

from __future__ import annotations

from typing import Any

from tiny_architectures import HEAD_SIZE, HIDDEN, VOCAB_SIZE, random_weight, shrunk

_VISION: dict[str, Any] = {
    "depth": 2, "image_size": 32, "patch_size": 8, "spatial_patch_size": 8, "out_hidden_size": 64,
    "num_position_embeddings": 16, "projection_dim": 64, "vision_output_dim": 64,
    "num_global_layers": 2, "mlp_ratio": 2.0, "qformer_hidden_size": 64, "encoder_hidden_size": 64,
    "num_query_tokens": 4, "projector_hidden_size": 64, "intermediate_layers_indices": [0],
    "projector_input_dim": 64, "projector_output_dim": 64,
}  # fmt: skip
"""Sizes of towers, where a config has a field of that name and kind."""
_MARKS = ("image", "video", "vision", "audio", "boi", "eoi", "boa", "eoa", "img")
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_CHANGES: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": VOCAB_SIZE - 1}},
    "emu3": {"vocabulary_map": {"<image>": VOCAB_SIZE - 1, "<|extra_200|>": VOCAB_SIZE - 2}},
    "cosmos3_edge_text": {"rope_parameters": _MROPE},
    "glm4v_text": {"rope_parameters": _MROPE},
    "glm4v_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1]}},
    "glm_ocr_text": {"rope_parameters": _MROPE},
    "glmga_text": {"rope_parameters": _MROPE},
    "paddleocr_vl_text": {"rope_parameters": _MROPE},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}},
    "hunyuan_vl_text": {
        "head_dim": HEAD_SIZE,
        "rope_parameters": {**_MROPE, "mrope_section": [2, 2, 2, 2]},
    },
    "hunyuan_vl_vision": {"text_hidden_size": HIDDEN},
    "inkling2_vision": {"text_hidden_size": HIDDEN},
    "molmo2_adapter": {"text_hidden_size": HIDDEN, "vision_feature_layer": [-1, 0]},
    "molmo2_vision": {"image_size": [32, 32]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48},
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
    "glm5_next_text": {
        "qk_rope_head_dim": 0,
        "head_dim": 0,
        "qk_head_dim": HEAD_SIZE,
        "linear_num_heads": 4,
        "linear_head_dim": HEAD_SIZE,
        # Every fourth by default, which is none of two.
        "layer_types": ["linear_attention", "indexed_attention"],
    },
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "2/4"},
    "pp_formulanet_vision": {
        "decoder_hidden_size": HIDDEN,
        "window_size": 2,
        "global_attn_indexes": [1],
        "mlp_dim": 64,
        "post_conv_in_channels": 32,
        "post_conv_mid_channels": 48,
        "post_conv_out_channels": 64,
        "output_channels": 32,
    },
    "muse_spark_audio": {"num_hidden_layers": 4},
    "radio": {"video_temporal_patch_size": 2},
    "qwen2_5_omni_thinker": {"vision_start_token_id": VOCAB_SIZE - 11},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCAB_SIZE - 11},
    "qwen2_5_omni_text": {"rope_parameters": _MROPE},
    "qwen4_exp_text": {
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_SIZE,
    },
    "step3p5": {"sliding_window": 32},
}
"""By `model_type`: what a part's config must say for the model to be made at all."""
_NAMED_BY_CHECKPOINTS = {
    "shieldgemma2": "ShieldGemma2ForImageClassification",
    "evolla": "EvollaForProteinText2Text",
}
"""Where the class of the mapping reads none of the checkpoints there are, nor its own."""


def image_text_architectures() -> list[str]:
    """The model types of transformers' image-text-to-text mapping, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def make_tiny_image_text(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny random model of an architecture, in float32; `changes` are fields of its config."""
    import torch
    import transformers

    config = tiny_image_text_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    named = _NAMED_BY_CHECKPOINTS.get(model_type)
    if named is None:
        made = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    else:
        made = getattr(transformers, named)(config)
    model = made.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.copy_(random_weight(name, parameter, seed))
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    return model


def tiny_image_text_config(model_type: str) -> Any:
    """The shrunk default config, and those of its parts, at any depth."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model_type, **_settings(AutoConfig.for_model(model_type)))


def _settings(default: Any) -> dict[str, Any]:
    """What is set of a config; parts as dictionaries."""
    model_type = default.model_type
    settings = shrunk(default, model_type)
    names = set(default.to_dict())
    settings |= {
        name: value
        for name, value in _VISION.items()
        if name in names and isinstance(getattr(default, name, None), (int, float, list))
        and not isinstance(getattr(default, name), bool)
    }  # fmt: skip
    settings |= _marks(names, default)
    for name, value in vars(default).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            settings[name] = {**_settings(value), "model_type": value.model_type}
    return settings | _CHANGES.get(model_type, {})


def _marks(names: set[str], default: Any) -> dict[str, Any]:
    """Ids of placeholders at the end of the vocabulary, where no prompt of text has them."""
    found = [
        name for name in sorted(names)
        if name.endswith(("token_id", "token_index")) and any(mark in name for mark in _MARKS)
        and isinstance(getattr(default, name, None), int)
    ]  # fmt: skip
    return {name: VOCAB_SIZE - 1 - index % 10 for index, name in enumerate(found)}
