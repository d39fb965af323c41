"""Why a model takes no images, found in what its checkpoint says and in how it was loaded."""

from __future__ import annotations

import importlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.engine.processor_classes import missing_backends, processor_class_of

if TYPE_CHECKING:
    from quire.core.engine.facts import EngineFacts

_SEEING = ("vision", "visual", "vq_config", "image_token", "image_size", "image_seq_length")
"""Parts of names of settings that only models with images have."""
_TOKENS = ("image_token_id", "image_token_index", "vocabulary_map")
"""Settings of which one says the token that stands for images."""
_TORCHVISION = "torchvision (pip install torchvision)"
_PAGED = "transformers (paged)"


def why_no_images(facts: EngineFacts) -> str:
    """The cause for which a running model refuses images, as a sentence without its end."""
    path = Path(facts.model_directory) / "config.json"
    try:
        settings: dict[str, Any] = json.loads(path.read_text("utf-8"))
    # A model that brought no such file runs all the same.
    except (OSError, ValueError):
        settings = {}
    if not any(part in name for name in settings for part in _SEEING):
        return "it has no part that sees"
    return (
        _why_not_placed(settings, facts)
        or _why_not_processed(str(settings.get("model_type", "")), path.parent)
        or _why_not_native(facts)
        or "its images were not held against transformers' own generation"
    )


def _why_not_placed(settings: dict[str, Any], facts: EngineFacts) -> str:
    """Why its images cannot stand among the tokens of a prompt; empty: they could."""
    if facts.encoder_input is not None:
        return "its images belong to its encoder, which is given text or sound"
    text = settings.get("text_config") or {}
    if "cross_attention_layers" in text:
        return "its layers look at images beside the text, by cross-attention"
    forward = facts.providers.get("forward", "")
    if forward.startswith("transformers") and forward != _PAGED:
        way = forward.removeprefix("transformers (").removesuffix(")")
        return f"it runs {way}, where its images were not held against its own generation"
    if forward and all(settings.get(name) is None for name in _TOKENS):
        return "its config names no token that stands for an image"
    return ""


def _why_not_native(facts: EngineFacts) -> str:
    """What a native family leaves to transformers' code; empty: none runs."""
    if facts.providers.get("forward"):
        return ""
    return "its native family reads text alone; model_impl transformers may see"


def _why_not_processed(model_type: str, directory: Path) -> str:
    """Why transformers cannot prepare its images here; empty: it can."""
    import transformers

    # By its module: some versions hide the name itself where torchvision is missing.
    module: Any = importlib.import_module("transformers.models.auto.image_processing_auto")
    try:
        processor = processor_class_of(model_type, directory)
    except KeyError:
        return f"neither transformers nor the checkpoint names a processor of {model_type!r}"
    except ImportError:
        return f"its processor wants {_TORCHVISION}"
    named = module.IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type)
    if named is None:
        return ""  # the checkpoint names its own
    pil = named.get("pil") if isinstance(named, dict) else named
    if pil is None and not find_spec("torchvision"):
        return f"its image processor wants {_TORCHVISION}"
    missing = missing_backends(processor) or missing_backends(getattr(transformers, str(pil), None))
    names = ", ".join(missing)
    return f"its processor wants {names} (pip install {' '.join(missing)})" if missing else ""
