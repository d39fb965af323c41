"""Recipes of tiny models that see, whose configs are the shrunk defaults of their families.

What differs from one family to the next is a `Recipe`: the ids of its placeholders, the sizes that
the shrunk config has too large, and the family's own image processor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_VQ = {
    "embed_dim": 8, "num_embeddings": 64, "latent_channels": 8, "base_channels": 32,
    "channel_multiplier": [1, 1, 1], "num_res_blocks": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a tiny model of a family is made."""

    mark: str
    """What stands for an image in a prompt."""
    token: str
    """What stands for a part of an image in the prompt written out."""
    make_images: Callable[[Any], Any]
    """The image processor, of the module `transformers`."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Of the shrunk config; dictionaries change parts."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What processor_config.json says."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that the processor asks its tokenizer for."""
    extra: tuple[str, ...] = ()
    """Tokens of this family alone, behind all others."""
    needs_torchvision: bool = False
    """Whether its image processor is written in torchvision alone, or its tower in timm."""


_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN = {
    "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
    "num_position_embeddings": 64,
}  # fmt: skip


def _qwen_images(hf: Any) -> Any:
    return hf.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40},
    )  # fmt: skip


def _glm_images(hf: Any) -> Any:
    return hf.Glm46VImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2,
        size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40},
    )  # fmt: skip


MORE = {
    "aria": Recipe(
        mark="<image>", token="<image>", named={"image_token": "<image>"},
        changes={
            "projector_patch_to_query_dict": {"49": 12},
            "max_value_projector_patch_to_query_dict": 12,
            "vision_config": {"image_size": 980, "patch_size": 140},
        },
        settings={"size_conversion": {980: 12}},
        make_images=lambda hf: hf.AriaImageProcessorPil(
            split_resolutions=[[980, 980]]
        ),
    ),
    "janus": Recipe(
        mark="<image>", token="<image>",
        named={
            "image_token": "<image>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        changes={"vq_config": {**_VQ, "image_token_embed_dim": 32, "num_patches": 4},
                 "vision_config": {"num_image_tokens": 16}},
        settings={"num_image_tokens": 16},
        make_images=lambda hf: hf.JanusImageProcessorPil(size={"height": 32, "width": 32}),
    ),
    "chameleon": Recipe(
        mark="<image>", token="<image>",
        named={
            "image_token": "<image>", "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>", "sep_token": "<end_of_utterance>",
        },
        changes={
            "vq_config": {**_VQ, "resolution": 32, "channel_multiplier": [1, 1, 1, 1]},
            "vocabulary_map": {
                "<image>": 3,
                **{f"IMGIMG{c}Z": 100 + i for i, c in enumerate(
                    f"{chr(65 + i // 8)}{chr(65 + i % 8)}" for i in range(64)
                )},
            },
        },
        settings={"image_seq_length": 16},
        make_images=lambda hf: hf.ChameleonImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    ),
    "deepseek_vl_hybrid": Recipe(
        mark="<image>", token="<image>", named={"image_token": "<image>"},
        changes={
            "high_res_vision_config": {
                "image_size": 64, "patch_size": 4, "output_channels": 16, "window_size": 4,
                "global_attn_indexes": [1], "mlp_dim": 64, "num_pos_feats": 32,
            },
        },
        settings={"num_image_tokens": 16},
        make_images=lambda hf: hf.DeepseekVLHybridImageProcessorPil(
            size={"height": 32, "width": 32}, high_res_size={"height": 64, "width": 64}
        ),
    ),
    "cohere_compass": Recipe(
        mark="<|VISION_START|><|IMAGE_PAD|><|VISION_END|>", token="<|IMAGE_PAD|>",
        extra=("<|IMAGE_PAD|>", "<|VIDEO_PAD|>", "<|VISION_START|>", "<|VISION_END|>"),
        changes={"vision_config": {"patch_size": 4, "spatial_merge_size": 2}},
        make_images=lambda hf: hf.CohereCompassImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40}
        ),
    ),
    "ovis2": Recipe(
        mark="<image>", token="<IMG_ATOM>",
        extra=("<IMG_START>", "<IMG_ATOM>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        changes={"vision_config": {"hidden_stride": 2, "num_visual_indicator_tokens": 5,
                                   "vocab_size": 32}},
        settings={"image_seq_length": 4},
        make_images=lambda hf: hf.Ovis2ImageProcessorPil(
            size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=2
        ),
    ),
    "llava_onevision": Recipe(
        mark="<image>", token="<image>",
        changes={"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]},
        settings={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        make_images=lambda hf: hf.LlavaOnevisionImageProcessorPil(
            size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
        ),
    ),
    "video_llava": Recipe(
        mark="<image>", token="<image>",
        changes={"vision_feature_layer": -1},
        settings={"patch_size": 8},
        make_images=lambda hf: hf.VideoLlavaImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    ),
    "qwen3_5": Recipe(
        mark=_QWEN_MARK, token="<|image_pad|>",
        changes={"vision_config": _QWEN, "video_token_id": 7, "vision_start_token_id": 4,
                 "vision_end_token_id": 5},
        make_images=_qwen_images,
    ),
    "qwen3_5_moe": Recipe(
        mark=_QWEN_MARK, token="<|image_pad|>",
        changes={"vision_config": _QWEN, "video_token_id": 7, "vision_start_token_id": 4,
                 "vision_end_token_id": 5},
        make_images=_qwen_images,
    ),
    "glm_ocr": Recipe(
        mark=_QWEN_MARK, token="<|image_pad|>",
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        changes={"vision_config": {**_QWEN, "image_size": 32}, "video_token_id": 7,
                 "image_start_token_id": 4, "image_end_token_id": 5},
        settings={"processor_class": "Glm46VProcessor"},
        make_images=_glm_images,
    ),
    "glmga": Recipe(
        mark=_QWEN_MARK, token="<|image_pad|>",
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        changes={"vision_config": {**_QWEN, "image_size": 32}, "video_token_id": 7,
                 "image_start_token_id": 4, "image_end_token_id": 5},
        settings={"processor_class": "Glm46VProcessor"},
        make_images=lambda hf: hf.GlmgaImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40},
        ),
    ),
    "cosmos3_omni": Recipe(
        mark=_QWEN_MARK, token="<|image_pad|>",
        changes={"vision_config": {**_QWEN, "deepstack_visual_indexes": [0, 1]},
                 "text_config": {"rope_parameters": _MROPE},
                 "video_token_id": 7, "vision_start_token_id": 4, "vision_end_token_id": 5},
        settings={"processor_class": "Qwen3VLProcessor"},
        make_images=_qwen_images,
    ),
    "granite_docling": Recipe(
        mark="<image>", token="<image>",
        changes={"vision_config": {"scale_factor": 2, "deepstack_visual_indexes": [0, 1]}},
        settings={"image_seq_len": 4},
        make_images=lambda hf: hf.GraniteDoclingImageProcessorPil(
            size={"height": 32, "width": 32}, max_patches=2
        ),
    ),
    "lfm3_vl": Recipe(
        mark=_QWEN_MARK, token="<|image_pad|>",
        changes={"vision_config": {"patch_size": 4}, "video_token_id": 7,
                 "vision_start_token_id": 4, "vision_end_token_id": 5},
        make_images=_qwen_images,
    ),
    "llama4": Recipe(
        mark="<|image|>", token="<|patch|>", needs_torchvision=True,
        extra=("<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>",
               "<|tile_x_separator|>", "<|tile_y_separator|>"),
        changes={"vision_config": {"pixel_shuffle_ratio": 0.5, "image_size": 32, "patch_size": 8,
                                   "vision_output_dim": 64, "intermediate_size": 256}},
        settings={"patch_size": 8},
        make_images=lambda hf: hf.Llama4ImageProcessor(
            size={"height": 32, "width": 32}, max_patches=2
        ),
    ),
    "lfm2_vl": Recipe(
        mark="<image>", token="<image>", needs_torchvision=True,
        named={"image_token": "<image>", "image_start_token": "<|image_start|>",
               "image_end_token": "<|image_end|>", "image_thumbnail_token": "<|img_thumbnail|>"},
        extra=("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>",
               *(f"<|img_row_{row}_col_{col}|>" for row in (1, 2) for col in (1, 2))),
        changes={"vision_config": {"patch_size": 8, "num_patches": 16}},
        make_images=lambda hf: hf.Lfm2VlImageProcessor(
            size={"height": 32, "width": 32}, encoder_patch_size=8, tile_size=32,
            min_image_tokens=1, max_image_tokens=4, max_tiles=2,
        ),
    ),
    "cohere2_vision": Recipe(
        mark="<image>", token="<image>", needs_torchvision=True,
        named={"image_token": "<image>", "boi_token": "<start_of_image>",
               "eoi_token": "<end_of_image>", "img_line_break_token": "<|IMG_LINE_BREAK|>"},
        changes={"vision_config": {"image_size": 32, "patch_size": 8}, "downsample_factor": 2},
        make_images=lambda hf: hf.Cohere2VisionImageProcessor(
            size={"height": 32, "width": 32}, patch_size=2, max_patches=2
        ),
    ),
    "kimi_k25": Recipe(
        mark="<|media_pad|>", token="<|media_pad|>", needs_torchvision=True,
        extra=("<|media_pad|>", "<|kimi_k25_video_placeholder|>"),
        changes={"vision_config": {"patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
                 "projection_hidden_size": 64},
        make_images=lambda hf: hf.Kimi_K25ImageProcessor(
            size={"max_height": 16, "max_width": 16}, patch_size=4, max_patches=64
        ),
    ),
    "gemma3n": Recipe(
        mark="<image_part>", token="<image_part>", needs_torchvision=True,
        named={"image_token": "<image_part>", "boi_token": "<start_of_image>",
               "eoi_token": "<end_of_parts>", "audio_token": "<audio>", "boa_token": "<boa>",
               "eoa_token": "<eoa>"},
        # Behind the words of the text: what the embedders of images and of sound embed.
        extra=("<image_part>", "<end_of_parts>", "<audio>", "<boa>", "<eoa>"),
        changes={"vision_config": {"architecture": "test_resnet", "hidden_size": 96,
                                   "vocab_offset": 57, "vocab_size": 2},
                 "audio_config": {"vocab_offset": 59, "vocab_size": 453},
                 "text_config": {"vocab_size_per_layer_input": 57},
                 "vision_soft_tokens_per_image": 4, "eoi_token_id": 58, "audio_token_id": 59},
        settings={"image_seq_length": 4},
        make_images=lambda hf: hf.SiglipImageProcessorPil(size={"height": 64, "width": 64}),
    ),
    "perception_lm": Recipe(
        mark="<image>", token="<image>", needs_torchvision=True,
        named={"image_token": "<image>", "video_token": "<video>"},
        changes={"vision_config": {"architecture": "test_vit", "hidden_size": 64,
                                   "model_args": {"img_size": 64, "embed_dim": 64}},
                 "projector_pooling_ratio": 2},
        settings={"patch_size": 16, "pooling_ratio": 2},
        make_images=lambda hf: hf.PerceptionLMImageProcessor(tile_size=64, max_num_tiles=2),
    ),
    "fast_vlm": Recipe(
        mark="<image>", token="<image>", needs_torchvision=True,
        named={"image_token": "<image>"},
        changes={"vision_config": {"architecture": "test_convnext", "hidden_size": 64,
                                   "model_args": {}}, "image_seq_length": 9},
        settings={"patch_size": 32, "vision_feature_select_strategy": "full",
                  "processor_class": "LlavaProcessor"},
        make_images=lambda hf: hf.CLIPImageProcessorPil(
            size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}
        ),
    ),
    "minimax_m3_vl": Recipe(
        mark="]<]image[>[", token="]<]image[>[", needs_torchvision=True,
        extra=("]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["),
        changes={"vision_config": {"patch_size": 4, "spatial_merge_size": 2}},
        make_images=lambda hf: hf.MiniMaxM3VLImageProcessor(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40}
        ),
    ),
    "muse_glimmer": Recipe(
        mark="<|patch|>", token="<|patch|>", needs_torchvision=True,
        extra=("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"),
        changes={"vision_config": {"patch_size": 4, "merge_size": 2}, "out_hidden_size": 256},
        make_images=lambda hf: hf.MuseGlimmerImageProcessor(
            patch_size=4, merge_size=2, max_image_tokens=24
        ),
    ),
    "step3p7": Recipe(
        mark="<im_patch>", token="<im_patch>", needs_torchvision=True,
        extra=("<im_patch>", "<patch_start>", "<patch_end>", "<patch_newline>", "<im_start>",
               "<im_end>"),
        changes={"vision_config": {"patch_size": 4, "image_size": 32}},
        make_images=lambda hf: hf.Step3p7ImageProcessor(
            size={"height": 32, "width": 32}, patch_size=32, vision_patch_size=4,
            max_image_size=64,
        ),
    ),
}  # fmt: skip
"""By `model_type`."""


def needs_torchvision(family: str) -> bool:
    """Whether a tiny model of a family cannot be made, or not be asked, without torchvision."""
    return family in MORE and MORE[family].needs_torchvision


def recipe_config(family: str, ids: Mapping[str, int]) -> Any:
    """The config of a tiny model; `ids` are those of all tokens."""
    from tiny_image_text import tiny_image_text_config
    from transformers import AutoConfig

    recipe = MORE[family]
    settings = _changed(tiny_image_text_config(family).to_dict(), recipe.changes)
    token = ids[recipe.token]
    for name in ("image_token_id", "image_token_index"):
        if name in settings:
            settings[name] = token
    if family == "ovis2":
        others = [name for name in recipe.extra if name != recipe.token]
        settings["visual_indicator_token_ids"] = [ids[name] for name in others]
    settings.pop("model_type")
    return AutoConfig.for_model(family, **settings)


def _changed(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, parts within parts."""
    changed = dict(settings)
    for name, value in changes.items():
        is_part = isinstance(value, dict) and "model_type" in (changed.get(name) or {})
        changed[name] = _changed(changed[name], value) if is_part else value
    return changed
