"""Processors of images where torchvision is not installed."""

from __future__ import annotations

import sys

import pytest
import transformers
from tiny_vision import make_image, make_vision_model

from quire.core.engine.image_reader import load_processor
from quire.core.engine.processor_classes import missing_backends, processor_class_of

HIDDEN = "transformers.models.pixtral.image_processing_pixtral"
needs_no_torchvision = pytest.mark.skipif(
    "torchvision" not in missing_backends(transformers.PixtralProcessor),
    reason="torchvision is installed",
)


def test_processor_that_is_there_is_taken_as_it_is():
    """Only what is hidden is looked for elsewhere."""
    assert processor_class_of("llava") is transformers.LlavaProcessor


@needs_no_torchvision
def test_processor_that_torchvision_hides_reads_images_with_pil(tmp_path):
    """Pixtral's own class, and as many placeholders as its image has patches."""
    processor = load_processor(make_vision_model("mistral3", tmp_path))
    read = processor(text=["<image>"], images=[[make_image(1, (40, 32))]], return_tensors="np")
    # 5 columns and 4 rows of 8 x 8, each row with a mark at its end.
    assert (read["input_ids"][0] == 3).sum() == 20
    assert len(read["input_ids"][0]) == 24
    assert type(processor).__mro__[1].__module__ == "transformers.models.pixtral.processing_pixtral"


@needs_no_torchvision
def test_stand_in_for_torchvision_is_gone_after_the_import():
    """Whoever asks for the module itself is told the truth."""
    processor_class_of("mistral3")
    assert HIDDEN not in sys.modules


def test_family_without_a_processor_is_a_key_error():
    """What transformers reads by none is not guessed."""
    with pytest.raises(KeyError):
        processor_class_of("llama")
