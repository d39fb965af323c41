"""Prompts with images: placeholders written out, pixels made what a vision tower takes.

The checkpoint's own processor of transformers says how many tokens an image stands for and which.
Every image is processed alone, so that its arrays and its hash do not depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.core.engine.features import Encode, ModelInput, make_feature
from quire.core.engine.images import MediaPolicy, read_image
from quire.core.engine.processor_classes import PROCESSOR_FILES, processor_class_of
from quire.core.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from quire.core.config import EngineConfig
    from quire.core.engine.facts import EngineFacts
    from quire.core.engine.prompts import ParsedPrompt
    from quire.core.interface.worker import Feature

IMAGE = "image"
logger = logging.getLogger(__name__)

_NOT_FOR_THE_TOWER = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "num_crops", "labels"}
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Shown:
    """One image as the model takes it."""

    token_ids: list[int]
    """Its placeholder written out."""
    num_placeholders: int
    arrays: dict[str, Any]


class ImageReader:
    """Reads the prompts of a model that sees; safe in several threads."""

    def __init__(
        self, processor: Any, policy: MediaPolicy, *, image_token_id: int, max_images: int
    ) -> None:
        """`max_images`: of one prompt."""
        self._processor = processor
        self._policy = policy
        self._image_token_id = image_token_id
        self._max_images = max_images
        self._placeholder = _placeholder_of(processor)

    @property
    def placeholder(self) -> str:
        """What stands for an image in a text."""
        return self._placeholder

    def read(self, parsed: ParsedPrompt, encode: Encode, *, add_special_tokens: bool) -> ModelInput:
        """Token ids with every placeholder written out, and a feature for each image."""
        given = images_of(parsed.data)
        if parsed.source is not None:
            raise RequestError("the model has no encoder; give prompt", param="encoder_prompt")
        if len(given) > self._max_images:
            raise RequestError(
                f"the prompt brings {len(given)} images; this engine takes {self._max_images} "
                "in one prompt (limit_mm_per_prompt)",
                param="multi_modal_data",
            )
        if not given:
            return ModelInput(token_ids=_plain_ids(parsed, encode, add_special_tokens))
        images = [read_image(one, self._policy) for one in given]
        shown = [self._show(image) for image in images]
        if parsed.token_ids is not None:
            ids = self._together(images) if len(images) > 1 else None
            shown = shown if ids is None else self._shown_together(images, shown, ids)
            token_ids = self._written_out(parsed.token_ids, shown)
        else:
            token_ids = self._ids_of_text(parsed.text or "", images, encode, add_special_tokens)
            shown = self._shown_together(images, shown, token_ids)
        return ModelInput(
            token_ids=token_ids, features=self._features(token_ids, shown), text=parsed.text
        )

    # --- parts ----------------------------------------------------------------------------------

    def _ids_of_text(
        self, text: str, images: Sequence[Any], encode: Encode, add_special_tokens: bool
    ) -> list[int]:
        """The processor's ids of a text; without its special tokens where they are written."""
        num_found = text.count(self.placeholder)
        if num_found != len(images):
            raise RequestError(
                f"the prompt has {num_found} placeholders {self.placeholder!r} for {len(images)} "
                "images; write one where each image stands",
                param="prompt",
            )
        ids = self._process(text, images)["input_ids"][0]
        token_ids = [int(token) for token in ids]
        if not add_special_tokens:
            return _without_special(token_ids, text, encode)
        return token_ids

    def _show(self, image: Any, copies: int = 1) -> _Shown:
        """One image as the model takes it, in a prompt that shows it so many times."""
        output = self._process(
            self.placeholder * copies, [image] * copies, add_special_tokens=False
        )
        ids = [int(token) for token in output["input_ids"][0]]
        ids = ids[: len(ids) // copies]
        arrays = {
            name: _first_part(_array(value), copies)
            for name, value in output.items()
            if name not in _NOT_FOR_THE_TOWER
        }
        count = ids.count(self._image_token_id)
        if not count:
            raise RequestError("the image is too small to be seen", param="multi_modal_data")
        ids = ids[: self._end_of_image(ids)]
        return _Shown(token_ids=ids, num_placeholders=count, arrays=arrays)

    def _together(self, images: Sequence[Any]) -> list[int]:
        """The ids of images alone, one after the other."""
        output = self._process(self.placeholder * len(images), images, add_special_tokens=False)
        return [int(token) for token in output["input_ids"][0]]

    def _shown_together(
        self, images: Sequence[Any], shown: list[_Shown], token_ids: Sequence[int]
    ) -> list[_Shown]:
        """Images as they are shown among so many, where that is in other tokens than alone.

        Some families cut one image into tiles and several into none. Every image is then processed
        beside copies of itself, so that it still does not depend on what its neighbours show.
        """
        count = len(images)
        expected = sum(one.num_placeholders for one in shown)
        if count < 2 or list(token_ids).count(self._image_token_id) == expected:
            return shown
        return [self._show(image, count) for image in images]

    def _end_of_image(self, ids: list[int]) -> int:
        """Where the text begins that a processor writes behind an image of its own accord."""
        last = len(ids) - 1 - ids[::-1].index(self._image_token_id)
        bos = self._processor.tokenizer.bos_token_id
        return ids.index(bos, last) if bos in ids[last:] else len(ids)

    def _process(self, text: str, images: Sequence[Any], **settings: Any) -> Any:
        try:
            return self._processor(
                text=[text],
                images=[list(images)],
                return_tensors=_kind(self._processor),
                **settings,
            )
        # The processor refuses sizes and ratios in errors of its own.
        except Exception as error:
            raise RequestError(
                f"the model's processor does not take the image: {error}"[:400],
                param="multi_modal_data",
            ) from error

    def _written_out(self, token_ids: Sequence[int], shown: Sequence[_Shown]) -> list[int]:
        """The ids with each placeholder replaced, unless they are written out already."""
        (mark,) = {self._mark_of(one) for one in shown}
        num_found = sum(1 for token in token_ids if token == mark)
        if num_found == sum(one.num_placeholders for one in shown) and mark == self._image_token_id:
            return list(token_ids)
        if num_found != len(shown):
            raise RequestError(
                f"the prompt has {num_found} placeholders (token {mark}) for {len(shown)} images",
                param="prompt",
            )
        remaining = iter(shown)
        written: list[int] = []
        for token in token_ids:
            written += next(remaining).token_ids if token == mark else [token]
        return written

    def _mark_of(self, shown: _Shown) -> int:
        """The token that stands for an image before it is written out."""
        tokenizer = self._processor.tokenizer
        return int(tokenizer.convert_tokens_to_ids(self.placeholder))

    def _features(self, token_ids: Sequence[int], shown: Sequence[_Shown]) -> list[Feature]:
        places = np.flatnonzero(np.asarray(token_ids) == self._image_token_id).tolist()
        expected = sum(one.num_placeholders for one in shown)
        if len(places) != expected:
            raise RequestError(
                f"the prompt has {len(places)} image tokens and its images make {expected}; write "
                f"{self.placeholder!r} once for each image and nowhere else",
                param="prompt",
            )
        features, start = [], 0
        for one in shown:
            mine = places[start : start + one.num_placeholders]
            start += one.num_placeholders
            features.append(
                make_feature(IMAGE, one.arrays, num_tokens=mine[-1] + 1 - mine[0], offset=mine[0])
            )
        return features


def _first_part(array: Any, copies: int) -> Any:
    """Of an array that has as much for each copy: the first's; else all of it."""
    if copies == 1 or not array.ndim or len(array) % copies:
        return array
    return array[: len(array) // copies]


def images_of(data: Mapping[str, Any]) -> list[Any]:
    """The images of `multi_modal_data`: one, or a list of them.

    Raises: RequestError for kinds that the model does not take.
    """
    others = sorted(str(kind) for kind in data if kind != IMAGE)
    if others:
        raise RequestError(
            f"the model takes text and images; the prompt brings {', '.join(others)}",
            param="multi_modal_data",
        )
    given = data.get(IMAGE)
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def media_policy(config: EngineConfig) -> MediaPolicy:
    """Where images may come from."""
    return MediaPolicy(
        allowed_domains=tuple(config.allowed_media_domains),
        allow_private=config.allow_private_media,
        local_folder=config.allowed_local_media_path,
    )


def make_image_reader(config: EngineConfig, facts: EngineFacts) -> ImageReader | None:
    """The reader of a model that sees; None: it does not.

    Raises: CheckpointError if its processor cannot be read.
    """
    directory = Path(facts.model_directory)
    if IMAGE not in facts.accepts:
        return None
    if not any((directory / name).is_file() for name in PROCESSOR_FILES):
        logger.warning("%s has no preprocessor_config.json: it answers text alone", directory)
        return None
    processor = load_processor(directory, config.tokenizer)
    settings = json.loads((directory / "config.json").read_text("utf-8"))
    named = settings.get("image_token_id", settings.get("image_token_index"))
    image_token_id = named if named is not None else processor.image_token_id
    return ImageReader(
        processor,
        media_policy(config),
        image_token_id=int(image_token_id),
        max_images=int(config.limit_mm_per_prompt.get(IMAGE, 16)),
    )


def _kind(processor: Any) -> str:
    """Of the arrays that a processor is asked for: one in torch may make some numpy has not."""
    is_torch = getattr(processor.image_processor, "backend", "pil") == "torchvision"
    return "pt" if is_torch else "np"


def _array(value: Any) -> Any:
    """An array of numpy, which has no 16-bit floats of eight exponent bits: widened, exactly."""
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        value = value.float()
    return np.asarray(value)


def _placeholder_of(processor: Any) -> str:
    """Of the tokens that a processor names, the one it takes for an image in a text."""
    names = ("boi_token", "image_placeholder_token", "image_token")
    found = (getattr(processor, name, None) for name in names)
    marks = [str(mark) for mark in dict.fromkeys(found) if mark]
    if len(marks) == 1:
        return marks[0]
    image = np.zeros((64, 64, 3), np.uint8)
    for mark in marks:
        # A processor that counts another token refuses this one, with an error of its own.
        with contextlib.suppress(Exception):
            processor(text=[mark], images=[[image]], return_tensors=_kind(processor))
            return mark
    return marks[0]


def load_processor(directory: Path, tokenizer: str | None = None) -> Any:
    """The checkpoint's processor, without its parts for videos and sound, which are not asked.

    Raises: CheckpointError if it cannot be made.
    """
    from transformers import AutoConfig, AutoTokenizer

    # By its module: some versions hide the name itself where torchvision is missing.
    module: Any = importlib.import_module("transformers.models.auto.image_processing_auto")
    loader = module.AutoImageProcessor
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        processor_class = processor_class_of(config.model_type, directory)
        images = loader.from_pretrained(directory, local_files_only=True, backend="pil")
        texts = AutoTokenizer.from_pretrained(tokenizer or directory)
        settings = _processor_settings(directory)
        return _make(processor_class, images, texts, settings)
    # Files may be broken in any way, and each class raises its own.
    except Exception as error:
        raise CheckpointError(
            f"{directory} has no processor of images that can be read "
            f"({type(error).__name__}: {error}); add its preprocessor_config.json"
        ) from error


def _make(processor_class: Any, images: Any, texts: Any, settings: dict[str, Any]) -> Any:
    class WithoutVideo(processor_class):  # type: ignore[misc]
        """The processor of images and text alone: those of videos and sound stay away."""

        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return (
                None
                if argument is None
                else super().check_argument_for_proper_class(name, argument)
            )

    WithoutVideo.__name__ = processor_class.__name__
    parameters = inspect.signature(processor_class.__init__).parameters
    unused = ("video_processor", "feature_extractor")
    settings = {**settings, **{name: None for name in unused if name in parameters}}
    return WithoutVideo(image_processor=images, tokenizer=texts, **settings)


def _processor_settings(directory: Path) -> dict[str, Any]:
    path = directory / "processor_config.json"
    if not path.is_file():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    parts = {"processor_class", "image_processor", "video_processor", "feature_extractor"}
    return {name: value for name, value in known.items() if name not in parts}


def _plain_ids(parsed: ParsedPrompt, encode: Encode, add_special_tokens: bool) -> list[int]:
    if parsed.token_ids is not None:
        return parsed.token_ids
    if parsed.text is None:
        raise RequestError("the prompt has no text", param="prompt")
    return encode(parsed.text, add_special_tokens=add_special_tokens)


def _without_special(token_ids: list[int], text: str, encode: Encode) -> list[int]:
    """Ids without the tokens that a tokenizer put around a text that has its own."""
    bare = encode(text, add_special_tokens=False)
    dressed = encode(text, add_special_tokens=True)
    if bare == dressed:
        return token_ids
    num_before = next(
        (n for n in range(len(dressed) - len(bare) + 1) if dressed[n : n + len(bare)] == bare), 0
    )
    num_after = len(dressed) - len(bare) - num_before
    return token_ids[num_before : len(token_ids) - num_after]
