"""Tiny random models of every image-text-to-text architecture, for prompts of text alone.

from tiny_image_text import image_text_architectures, make_tiny_image_text
model = make_tiny_image_text("internvl")
"""

from __future__ import annotations

from typing import Any

from tiny_architectures import VOCAB_SIZE, random_weight, shrunk

_VISION: dict[str, Any] = {
    "depth": 2, "image_size": 32, "patch_size": 8, "spatial_patch_size": 8, "out_hidden_size": 64,
    "num_position_embeddings": 16, "projection_dim": 64, "vision_output_dim": 64,
    "num_global_layers": 2, "mlp_ratio": 2.0, "qformer_hidden_size": 64, "encoder_hidden_size": 64,
    "num_query_tokens": 4, "projector_hidden_size": 64, "intermediate_layers_indices": [0],
    "projector_input_dim": 64, "projector_output_dim": 64,
}  # fmt: skip
"""Sizes of towers, where a config has a field of that name and kind."""
_MARKS = ("image", "video", "vision", "audio", "boi", "eoi", "boa", "eoa", "img")
_CHANGES: dict[str, dict[str, Any]] = {}
"""By `model_type`: what a part's config must say for the model to be made at all."""


def image_text_architectures() -> list[str]:
    """The model types of transformers' image-text-to-text mapping, sorted."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def make_tiny_image_text(model_type: str, seed: int = 0) -> Any:
    """A tiny random model of an architecture, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = tiny_image_text_config(model_type)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
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
