"""What a checkpoint's own classes make of sound and pictures, for fronts and at load."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.core.errors import CheckpointError

PICTURES = "pixel_values"
"""What encoders that see call their input."""
SOUNDS = ("input_features", "input_values")
"""What encoders that hear call their input: spectra, or samples."""


@dataclass(frozen=True, slots=True)
class SourceSteps:
    """How many tokens an encoder makes of n frames of its input."""

    stride: int
    offset: int
    multiple: int = 1
    """An encoder may take whole groups of so many frames alone, which are then counted."""

    def tokens_of(self, num_frames: int) -> int:
        """floor((n // multiple + offset) / stride)."""
        return (num_frames // self.multiple + self.offset) // self.stride

    def usable(self, num_frames: int) -> int:
        """Those in whole groups."""
        return num_frames - num_frames % self.multiple


def load_extractor(directory: str) -> Any:
    """The feature extractor of transformers. Raises: CheckpointError if it cannot be read."""
    from transformers import AutoFeatureExtractor

    load: Any = AutoFeatureExtractor.from_pretrained
    try:
        return load(directory, local_files_only=True)
    # Files may be broken in any way.
    except Exception as error:
        raise CheckpointError(
            f"{directory} has no feature extractor that can be read ({error}); add its "
            "preprocessor_config.json"
        ) from error


def extracted(
    extractor: Any, samples: npt.NDArray[np.float32]
) -> tuple[str, npt.NDArray[np.float32]]:
    """What a feature extractor makes of one sound: its name, and [frames, ...] but masked ones.

    samples: float32 [n] at its rate. What it pads to a window of its own stays whole. Its own
    errors pass.
    """
    settings = {"sampling_rate": int(extractor.sampling_rate), "return_tensors": "np"}
    try:
        made = extractor(samples, **settings)
    except AttributeError:  # some work on tensors alone
        made = extractor(samples, **{**settings, "return_tensors": "pt"})
    name = next(name for name in SOUNDS if name in made)
    array, mask = np.asarray(made[name][0], np.float32), made.get("attention_mask")
    return name, array if mask is None else array[: int(np.asarray(mask[0]).sum())]


def load_image_processor(directory: str) -> Any:
    """The image processor of transformers, on Pillow. Raises: CheckpointError."""
    # By its module: some versions hide the name itself where torchvision is missing.
    module: Any = importlib.import_module("transformers.models.auto.image_processing_auto")
    try:
        loader = module.AutoImageProcessor
        return loader.from_pretrained(directory, local_files_only=True, backend="pil")
    # Files may be broken in any way.
    except Exception as error:
        raise CheckpointError(
            f"{directory} has no image processor that can be read ({error}); add its "
            "preprocessor_config.json"
        ) from error


def prepared(processor: Any, picture: Any) -> npt.NDArray[np.float32]:
    """What an image processor makes of one picture, [channels, height, width].

    picture: uint8 [height, width, 3], or a picture of Pillow. Its own errors pass.
    """
    made = processor(images=picture, return_tensors="np")
    return np.asarray(made[PICTURES][0], np.float32)
