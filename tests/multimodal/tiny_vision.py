"""Tiny random models that see, with tokenizers and processors, made without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from more_vision import MORE, recipe_config
from PIL import Image

SPECIAL = (
    "<pad>", "<bos>", "<eos>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>", "<start_of_image>", "<end_of_image>", "<image_soft_token>",
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 3) for col in range(1, 3)),
)  # fmt: skip
TILE_MARKS = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>",
)  # fmt: skip
"""Behind the words, so that ids of words stay what they were."""
WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "sees",
    "what",
    "is",
    "in",
    "this",
    "picture",
    "and",
    "that",
    "one",
    "of",
    "two",
    "red",
    "blue",
    "image",
    "describe",
    "it",
    "please",
    "tell",
    "me",
    "more",
    "user",
    ":",
    "assistant",
    ".",
    "?",
    "\n",
]
_VOCABULARY = (*SPECIAL, "<unk>", *WORDS, *TILE_MARKS)
_TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 32, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    "in_channels": 3, "in_chans": 3,
}  # fmt: skip
_QWEN_IDS = {
    "image_token_id": 6, "video_token_id": 7, "vision_start_token_id": 4, "vision_end_token_id": 5,
}  # fmt: skip
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_CHAT = (
    "{% for m in messages %}{{ m.role }} : {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'image' %}MARK{% else %}{{ p.text }}{% endif %} "
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)
_QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
MARKS = {
    "llava": "<image>",
    "qwen2_vl": _QWEN_MARK,
    "qwen2_5_vl": _QWEN_MARK,
    "qwen3_vl": _QWEN_MARK,
    "qwen3_vl_moe": _QWEN_MARK,
    "glm4v": _QWEN_MARK,
    "glm4v_moe": _QWEN_MARK,
    "glm46v": _QWEN_MARK,
    "exaone4_5": _QWEN_MARK,
    "video_llama_3": _QWEN_MARK,
    "deepseek_vl": "<image>",
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "idefics2": "<image>",
    "vipllava": "<image>",
    "paligemma": "<image>",
    "llava_next": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "aya_vision": "<image>",
    "mistral3": "<image>",
    "lighton_ocr": "<image>",
    "qianfan_ocr": "<image>",
    "llava_next_video": "<image>",
    "hyperclovax_vision_v2": "<|image_pad|>",
    "paddleocr_vl": "<|image_pad|>",
    **{family: recipe.mark for family, recipe in MORE.items()},
}
"""What stands for an image in a prompt, by family."""


def make_vision_model(family: str, directory: Path, *, seed: int = 0) -> Path:
    """Writes a model of `family` with its tokenizer and image processor to `directory`."""
    import transformers

    config = make_config(family)
    torch.manual_seed(seed)
    model = getattr(transformers, config.architectures[0])(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.25 if "embed_tokens" in name else 0.12)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(directory)
    make_tokenizer(family).save_pretrained(directory)
    make_image_processor(family).save_pretrained(directory)
    (directory / "processor_config.json").write_text(json.dumps(processor_settings(family)))
    return directory


def make_tokenizer(family: str) -> Any:
    """A word-level tokenizer that knows the special tokens of all families."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = _ids(family)
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    named: Any = _NAMED.get(family)
    extra = ()
    if family in MORE:
        named, extra = dict(MORE[family].named), MORE[family].extra
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>",
        eos_token="<eos>", extra_special_tokens=named or [*SPECIAL[3:], *TILE_MARKS, *extra],
        chat_template=_CHAT.replace("MARK", MARKS[family]),
    )  # fmt: skip


def _ids(family: str) -> dict[str, int]:
    """Token to id."""
    extra = MORE[family].extra if family in MORE else ()
    return {word: index for index, word in enumerate((*_VOCABULARY, *extra))}


_NAMED = {
    "gemma3": {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
    "glm4v": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "glm4v_moe": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "glm46v": {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    "deepseek_vl": {"image_token": "<image>"},
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    },
    "lighton_ocr": {
        "image_token": "<image>", "image_break_token": "<|IMG_LINE_BREAK|>",
        "image_end_token": "<|END_OF_IMG|>",
    },
    "qianfan_ocr": {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "image_placeholder": "<image>",
    },
    "paddleocr_vl": {"image_token": "<|image_pad|>"},
}  # fmt: skip


def make_config(family: str) -> Any:
    """The config of a tiny model."""
    import transformers as hf

    if family in MORE:
        config = recipe_config(family, _ids(family))
    elif family == "llava":
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**_TEXT),
            image_token_index=3, image_token_id=3, vision_feature_layer=-1,
        )  # fmt: skip
    elif family in GRIDS:
        config = _grid_config(family)
    elif family == "gemma3":
        config = hf.Gemma3Config(
            text_config={**_TEXT, "sliding_window": 12, "query_pre_attn_scalar": 16,
                         "layer_types": ["sliding_attention", "full_attention"] * 2,
                         "num_hidden_layers": 4},
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=16, boi_token_index=8, eoi_token_index=9, image_token_index=10,
        )  # fmt: skip
    elif family == "vipllava":
        config = hf.VipLlavaConfig(
            vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**_TEXT),
            image_token_index=3, vision_feature_layers=[-2, -1], image_seq_length=16,
        )  # fmt: skip
    elif family == "deepseek_vl":
        config = hf.DeepseekVLConfig(
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            text_config={**_TEXT, "model_type": "llama"}, image_token_id=3,
            tie_word_embeddings=False,
        )  # fmt: skip
    elif family == "video_llama_3":
        vision = {k: _VISION[k] for k in _VISION if k not in ("image_size", "projection_dim")}
        config = hf.VideoLlama3Config(
            vision_config={**vision, "patch_size": 4},
            text_config={**_TEXT, "model_type": "qwen2"},
            image_token_id=6, video_token_id=7, tie_word_embeddings=False,
        )  # fmt: skip
    elif family == "idefics2":
        config = hf.Idefics2Config(
            vision_config={k: v for k, v in _VISION.items() if k != "projection_dim"},
            perceiver_config={
                "hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1,
                "resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2,
            },
            text_config={**_TEXT, "model_type": "mistral", "sliding_window": None},
            image_token_id=3,
        )  # fmt: skip
    elif family in ("idefics3", "smolvlm"):
        made = hf.Idefics3Config if family == "idefics3" else hf.SmolVLMConfig
        config = made(
            vision_config={**_VISION}, text_config={**_TEXT, "model_type": "llama"},
            image_token_id=3, scale_factor=2, pad_token_id=0, tie_word_embeddings=False,
        )  # fmt: skip
    elif family == "paligemma":
        config = hf.PaliGemmaConfig(
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            text_config={**_TEXT, "model_type": "gemma"}, image_token_index=3, projection_dim=64,
        )  # fmt: skip
    else:
        config = _tiled_config(family)
    config.architectures = [_architecture(family)]
    return config


def _architecture(family: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return str(_ARCHITECTURES.get(family) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])


_ARCHITECTURES = {
    "llava": "LlavaForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "glm4v": "Glm4vForConditionalGeneration",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "glm46v": "Glm46VForConditionalGeneration",
    "exaone4_5": "Exaone4_5_ForConditionalGeneration",
    "video_llama_3": "VideoLlama3ForConditionalGeneration",
    "deepseek_vl": "DeepseekVLForConditionalGeneration",
    "idefics2": "Idefics2ForConditionalGeneration",
    "vipllava": "VipLlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "paligemma": "PaliGemmaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "aya_vision": "AyaVisionForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "lighton_ocr": "LightOnOcrForConditionalGeneration",
    "qianfan_ocr": "QianfanOCRForConditionalGeneration",
    "llava_next_video": "LlavaNextVideoForConditionalGeneration",
    "hyperclovax_vision_v2": "HyperCLOVAXVisionV2ForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
}


def _tiled_config(family: str) -> Any:
    """Of a family whose images have rows or tiles of different numbers."""
    import transformers as hf

    if family in ("llava_next", "llava_next_video"):
        made = hf.LlavaNextConfig if family == "llava_next" else hf.LlavaNextVideoConfig
        others = {} if family == "llava_next" else {"video_token_index": 7}
        return made(
            **others, vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**_TEXT),
            image_token_index=3, vision_feature_layer=-1, image_grid_pinpoints=_PINPOINTS,
        )  # fmt: skip
    if family == "internvl":
        vision = {**_VISION, "image_size": [32, 32], "patch_size": [8, 8]}
        vision.pop("projection_dim")
        return hf.InternVLConfig(
            vision_config=vision, text_config={**_TEXT, "model_type": "qwen2"},
            image_token_id=_VOCABULARY.index("<IMG_CONTEXT>"), image_seq_length=4,
        )  # fmt: skip
    if family == "aya_vision":
        return hf.AyaVisionConfig(
            vision_config={**_VISION, "model_type": "siglip_vision_model"},
            text_config={**_TEXT, "model_type": "cohere2", "sliding_window": 12},
            image_token_index=_VOCABULARY.index("<|IMG_PATCH|>"), downsample_factor=2,
            vision_feature_layer=-1, alignment_intermediate_size=64,
        )  # fmt: skip
    return _patched_config(family)


_PATCHED = {k: _VISION[k] for k in _VISION if k != "projection_dim"} | {"patch_size": 4}


def _patched_config(family: str) -> Any:
    """Of a family whose tower takes images of any shape, or that reads pages."""
    import transformers as hf

    pixtral = {**_PATCHED, "model_type": "pixtral", "head_dim": 16}
    if family == "mistral3":
        return hf.Mistral3Config(
            vision_config=pixtral, image_token_index=3, spatial_merge_size=2,
            text_config={**_TEXT, "model_type": "mistral", "sliding_window": None},
        )  # fmt: skip
    if family == "lighton_ocr":
        return hf.LightOnOcrConfig(
            vision_config=pixtral, text_config={**_TEXT, "model_type": "qwen3"},
            image_token_id=3, spatial_merge_size=2,
        )  # fmt: skip
    if family == "qianfan_ocr":
        vision = {**_PATCHED, "image_size": [32, 32], "patch_size": [8, 8]}
        return hf.QianfanOCRConfig(
            vision_config=vision, text_config={**_TEXT, "model_type": "qwen3"},
            image_token_id=_VOCABULARY.index("<IMG_CONTEXT>"), image_seq_length=4,
        )  # fmt: skip
    if family == "hyperclovax_vision_v2":
        vision = {
            **_QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48,
            "window_size": 16, "fullatt_block_indexes": [1],
        }  # fmt: skip
        return hf.HyperCLOVAXVisionV2Config(
            vision_config=vision, text_config=_TEXT, image_token_id=6, video_token_id=7,
            tie_word_embeddings=False,
        )  # fmt: skip
    if family == "paddleocr_vl":
        return hf.PaddleOCRVLConfig(
            vision_config={**_PATCHED, "spatial_merge_size": 2, "temporal_patch_size": 1},
            text_config={**_TEXT, "rope_parameters": _MROPE},
            **_QWEN_IDS,
        )  # fmt: skip
    raise ValueError(family)


_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


GRIDS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe", "glm46v",
    "exaone4_5",
)  # fmt: skip
"""Families whose images come as patches of a grid of any shape."""


def _grid_config(family: str) -> Any:
    import transformers as hf

    text = {**_TEXT, "rope_parameters": _MROPE}
    if family == "qwen2_vl":
        vision = {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return hf.Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)
    vision = {**_QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)
    if family == "exaone4_5":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 2}
        vision.pop("in_chans")
        text = {**_TEXT, "model_type": "exaone4", "sliding_window": 12}
        text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        ids = {name: _QWEN_IDS[name] for name in ("image_token_id", "video_token_id")}
        return hf.Exaone4_5_Config(text_config=text, vision_config=vision, **ids)
    if family.startswith("glm4"):
        return _glm_config(family, text, vision)
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text["rope_parameters"] = {**_MROPE, "mrope_interleaved": True}
    if family == "qwen3_vl":
        return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _glm_config(family: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    import transformers as hf

    vision = {name: vision[name] for name in vision if name != "in_chans"} | {"image_size": 32}
    ids = {
        "image_token_id": 6, "video_token_id": 7, "image_start_token_id": 4,
        "image_end_token_id": 5, "video_start_token_id": 94, "video_end_token_id": 95,
    }  # fmt: skip
    if family in ("glm4v", "glm46v"):
        made = hf.Glm4vConfig if family == "glm4v" else hf.Glm46VConfig
        return made(text_config=text, vision_config=vision, **ids)
    text |= {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
        "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
    }  # fmt: skip
    return hf.Glm4vMoeConfig(text_config=text, vision_config=vision, **ids)


def make_image_processor(family: str) -> Any:
    """The family's image processor for images of 32 x 32, or of at most 64 x 64."""
    import transformers as hf

    if family in MORE:
        return MORE[family].make_images(hf)
    if family in ("llava", "vipllava"):
        size = {"shortest_edge": 32}
        return hf.CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    if family in GRIDS or family == "hyperclovax_vision_v2":
        made = hf.Qwen2VLImageProcessorPil
        if family.startswith("glm4"):
            is_first = family.startswith("glm4v")
            made = hf.Glm4vImageProcessorPil if is_first else hf.Glm46VImageProcessorPil
        return made(
            patch_size=4, merge_size=2, temporal_patch_size=2,
            size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40},
        )  # fmt: skip
    if family == "video_llama_3":
        return hf.VideoLlama3ImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40}
        )  # fmt: skip
    if family == "deepseek_vl":
        return hf.DeepseekVLImageProcessorPil(size={"height": 32, "width": 32})
    if family == "idefics2":
        return hf.Idefics2ImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 32})
    if family == "gemma3":
        return hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    if family == "paligemma":
        size = {"height": 32, "width": 32}
        return hf.SiglipImageProcessorPil(size=size, image_seq_length=16)
    if family in ("llava_next", "llava_next_video"):
        return hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32},
            image_grid_pinpoints=_PINPOINTS,
        )  # fmt: skip
    if family in ("mistral3", "lighton_ocr"):
        return hf.PixtralImageProcessorPil(
            patch_size={"height": 8, "width": 8}, size={"longest_edge": 40}
        )
    if family == "paddleocr_vl":
        return hf.PaddleOCRVLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=1,
            size={"shortest_edge": 8 * 8, "longest_edge": 40 * 40},
        )  # fmt: skip
    if family in ("internvl", "aya_vision", "qianfan_ocr"):
        size = {"height": 32, "width": 32}
        return hf.GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=2)
    made = hf.Idefics3ImageProcessorPil if family == "idefics3" else hf.SmolVLMImageProcessorPil
    return made(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})


def processor_settings(family: str) -> dict[str, Any]:
    """What processor_config.json says."""
    if family in MORE:
        return dict(MORE[family].settings)
    if family in ("llava", "vipllava"):
        return {
            "patch_size": 8, "vision_feature_select_strategy": "default", "image_token": "<image>",
            "num_additional_image_tokens": 1,
        }  # fmt: skip
    if family in ("llava_next", "llava_next_video"):
        return {
            "patch_size": 8, "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }  # fmt: skip
    if family in ("internvl", "qianfan_ocr"):
        return {"image_seq_length": 4}
    if family == "mistral3":
        return {
            "patch_size": 4, "spatial_merge_size": 2, "image_token": "<image>",
            "image_break_token": "<|IMG_LINE_BREAK|>", "image_end_token": "<|END_OF_IMG|>",
        }  # fmt: skip
    if family == "lighton_ocr":
        return {"patch_size": 4, "spatial_merge_size": 2}
    if family == "aya_vision":
        return {"patch_size": 8, "img_size": 32, "downsample_factor": 2}
    if family == "gemma3":
        return {"image_seq_length": 16}
    if family == "deepseek_vl":
        return {"num_image_tokens": 16}
    if family in ("idefics2", "idefics3", "smolvlm"):
        return {"image_seq_len": 4}
    return {}


def make_image(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Noise; (width, height)."""
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), np.uint8))
