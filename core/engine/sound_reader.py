"""Prompts with sound among their tokens: placeholders written out, samples made spectra.

The checkpoint's own processor of transformers says how many tokens a sound stands for. Every sound
is processed alone, so that its arrays and its hash do not depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.core.engine.audio import AudioClip
from quire.core.engine.audio_features import checked_samples, resample
from quire.core.engine.features import Encode, ModelInput, make_feature
from quire.core.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from quire.core.config import EngineConfig
    from quire.core.engine.facts import EngineFacts
    from quire.core.engine.prompts import ParsedPrompt
    from quire.core.interface.worker import Feature

AUDIO = "audio"
logger = logging.getLogger(__name__)
_FILES = ("preprocessor_config.json", "processor_config.json")
_NOT_HEARD = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sound:
    """One sound as the model takes it."""

    token_ids: list[int]
    """Its placeholder written out, with what the processor puts around it."""
    first: int
    """Where in these the tokens of the sound begin."""
    num_tokens: int
    arrays: dict[str, Any]


class SoundReader:
    """Reads the prompts of a model that hears among its tokens; safe in several threads."""

    def __init__(self, processor: Any, *, audio_token_id: int, max_sounds: int) -> None:
        """`max_sounds`: of one prompt."""
        self._processor = processor
        self._token_id = audio_token_id
        self._max_sounds = max_sounds
        self._rate = int(processor.feature_extractor.sampling_rate)

    def read(self, parsed: ParsedPrompt, encode: Encode, *, add_special_tokens: bool) -> ModelInput:
        """Token ids with every placeholder written out, and a feature for each sound.

        Raises: RequestError for a sound that is none, and for placeholders that do not fit.
        """
        if parsed.source is not None:
            raise RequestError("the model has no encoder; give prompt", param="encoder_prompt")
        given = sounds_of(parsed.data)
        if len(given) > self._max_sounds:
            raise RequestError(
                f"the prompt brings {len(given)} sounds; this engine takes {self._max_sounds} "
                "in one prompt (limit_mm_per_prompt)",
                param="multi_modal_data",
            )
        token_ids = parsed.token_ids
        if token_ids is None:
            if parsed.text is None:
                raise RequestError("the prompt has no text", param="prompt")
            token_ids = encode(parsed.text, add_special_tokens=add_special_tokens)
        if not given:
            return ModelInput(token_ids=token_ids)
        sounds = [self._hear(one) for one in given]
        if len(given) > 1:
            self._process(given)  # some processors refuse several in one text
        written, features = self._written_out(token_ids, sounds)
        return ModelInput(token_ids=written, features=features, text=parsed.text)

    # --- parts ----------------------------------------------------------------------------------

    def _process(self, given: Sequence[Any]) -> Any:
        clips = [clip_of(one, self._rate) for one in given]
        samples = [resample(checked_samples(c), int(c.sample_rate), self._rate) for c in clips]
        text = " ".join([str(self._processor.audio_token)] * len(samples))
        try:
            return self._processor(
                text=[text],
                audio=samples,
                sampling_rate=self._rate,
                add_special_tokens=False,
                return_tensors="pt",
            )
        # The processor refuses lengths in errors of its own.
        except Exception as error:
            raise RequestError(
                f"the model's processor does not take the sound: {error}"[:400],
                param="multi_modal_data",
            ) from error

    def _hear(self, given: Any) -> _Sound:
        output = self._process([given])
        ids = [int(token) for token in output["input_ids"][0]]
        count = ids.count(self._token_id)
        if not count:
            raise RequestError("the sound is too short to be heard", param="multi_modal_data")
        first = ids.index(self._token_id)
        if ids[first : first + count] != [self._token_id] * count:
            raise RequestError(
                "the model's processor cuts the sound into parts with tokens between them, which "
                "is not served; send a shorter one",
                param="multi_modal_data",
            )
        arrays = {
            name: np.asarray(value) for name, value in output.items() if name not in _NOT_HEARD
        }
        return _Sound(token_ids=ids, first=first, num_tokens=count, arrays=arrays)

    def _written_out(
        self, token_ids: Sequence[int], sounds: Sequence[_Sound]
    ) -> tuple[list[int], list[Feature]]:
        """The ids with one placeholder of each sound as many as it takes, and the features.

        Raises: RequestError if they are not as many as there are sounds.
        """
        num_found = sum(1 for token in token_ids if token == self._token_id)
        if num_found != len(sounds):
            raise RequestError(
                f"the prompt has {num_found} placeholders {self._processor.audio_token!r} for "
                f"{len(sounds)} sounds; write one where each sound stands",
                param="prompt",
            )
        remaining = iter(sounds)
        written: list[int] = []
        features: list[Feature] = []
        for token in token_ids:
            if token != self._token_id:
                written.append(token)
                continue
            one = next(remaining)
            offset = len(written) + one.first
            features.append(
                make_feature(AUDIO, one.arrays, num_tokens=one.num_tokens, offset=offset)
            )
            written += one.token_ids
        return written, features


def sounds_of(data: Mapping[str, Any]) -> list[Any]:
    """The sounds of `multi_modal_data`: one, or a list of them.

    Raises: RequestError for kinds that the model does not take.
    """
    others = sorted(str(kind) for kind in data if kind != AUDIO)
    if others:
        raise RequestError(
            f"the model takes text and audio; the prompt brings {', '.join(others)}",
            param="multi_modal_data",
        )
    given = data.get(AUDIO)
    if given is None:
        return []
    is_one = isinstance(given, AudioClip | tuple | np.ndarray)
    return [given] if is_one or not isinstance(given, list) else list(given)


def clip_of(given: Any, sample_rate: int) -> AudioClip:
    """A clip of `(samples, rate)`, of samples at the model's own rate, or as it is."""
    if isinstance(given, AudioClip):
        return given
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], int | float):
        return AudioClip(samples=given[0], sample_rate=int(given[1]))
    return AudioClip(samples=given, sample_rate=sample_rate)


def make_sound_reader(config: EngineConfig, facts: EngineFacts) -> SoundReader | None:
    """The reader of a model that hears among its tokens; None: it does not.

    Raises: CheckpointError if its processor cannot be read.
    """
    directory = Path(facts.model_directory)
    if AUDIO not in facts.accepts:
        return None
    if not any((directory / name).is_file() for name in _FILES):
        logger.warning("%s has no preprocessor_config.json: it answers text alone", directory)
        return None
    from transformers import AutoConfig, AutoProcessor

    load: Any = AutoProcessor.from_pretrained
    try:
        processor = load(directory, local_files_only=True)
        token_id = AutoConfig.from_pretrained(directory, local_files_only=True).audio_token_id
    # Files may be broken in any way, and each class raises its own.
    except Exception as error:
        raise CheckpointError(
            f"{directory} has no processor of sound that can be read "
            f"({type(error).__name__}: {error}); add its preprocessor_config.json"
        ) from error
    return SoundReader(
        processor,
        audio_token_id=int(token_id),
        max_sounds=int(config.limit_mm_per_prompt.get(AUDIO, 16)),
    )
