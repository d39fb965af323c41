"""Who reads the prompts of a model with an encoder: text for T5, sound for Whisper, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from quire.core.engine.audio import AudioClip
from quire.core.engine.audio_features import AudioFeatures
from quire.core.engine.features import Encode, FeatureReader, ModelInput, make_feature
from quire.core.engine.image_reader import images_of, media_policy
from quire.core.engine.images import MediaPolicy, read_image
from quire.core.engine.sampling_spec import check_token_ids
from quire.core.engine.sequence_defaults import SequenceDefaults, read_sequence_defaults
from quire.core.errors import RequestError
from quire.core.source_features import PICTURES, SourceSteps, load_image_processor, prepared

if TYPE_CHECKING:
    from quire.core.config import EngineConfig
    from quire.core.engine.facts import EngineFacts
    from quire.core.engine.prompts import ParsedPrompt

TOKENS, AUDIO, IMAGE = "tokens", "audio", "image"


def make_reader(config: EngineConfig, facts: EngineFacts) -> FeatureReader | None:
    """The reader of a model that takes more than the tokens of a text; None: it does not.

    Raises: CheckpointError if what it needs of the checkpoint cannot be read.
    """
    if facts.encoder_input is None:
        return None
    defaults = read_sequence_defaults(facts.model_directory)
    if facts.encoder_input == AUDIO:
        steps = SourceSteps(*facts.source_steps) if facts.source_steps else None
        audio = AudioFeatures(facts.model_directory, facts.max_source_tokens, steps)
        return AudioReader(audio, defaults)
    if facts.encoder_input == IMAGE:
        processor = load_image_processor(facts.model_directory)
        policy = media_policy(config)
        return PictureReader(processor, policy, defaults, facts.max_source_tokens)
    return TextPairReader(defaults, facts.model, defaults.source_vocab_size or facts.vocab_size)


class TextPairReader:
    """For models whose encoder reads a text: a plain prompt is the encoder's."""

    def __init__(self, defaults: SequenceDefaults, model: str, source_vocab_size: int) -> None:
        self._source_vocab_size = source_vocab_size
        self._defaults = defaults
        self._model = model

    def read(self, parsed: ParsedPrompt, encode: Encode, *, add_special_tokens: bool) -> ModelInput:
        """The encoder's text as a feature, and the tokens with which the decoder starts."""
        if parsed.data:
            raise RequestError(
                f"multi_modal_data was given; {self._model!r} reads text alone",
                param="multi_modal_data",
            )
        source = parsed if parsed.source is None else parsed.source
        source_ids = _ids(source, encode, add_special_tokens)
        if not source_ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        check_token_ids(source_ids, self._source_vocab_size, "the encoder's prompt")
        target: list[int] | None = None
        if parsed.source is not None and (parsed.text is not None or parsed.token_ids is not None):
            target = _ids(parsed, encode, False)
        arrays = {"input_ids": np.asarray(source_ids, np.int64)}
        return ModelInput(
            token_ids=self._defaults.start_of(target),
            features=[make_feature(TOKENS, arrays, num_tokens=len(source_ids))],
            suppressed_ids=self._defaults.suppressed_ids,
            begin_suppressed_ids=self._defaults.begin_suppressed_ids,
            text=source.text,
        )


class AudioReader:
    """For models whose encoder hears: the prompt is the decoder's, and sound comes beside it."""

    def __init__(self, audio: AudioFeatures, defaults: SequenceDefaults) -> None:
        self.audio = audio
        self.defaults = defaults

    def read(self, parsed: ParsedPrompt, encode: Encode, *, add_special_tokens: bool) -> ModelInput:
        """One window of sound as a feature, and the tokens with which the decoder starts.

        Whisper's own tokens are written in the prompt, so that none are added.
        """
        del add_special_tokens
        clip = _clip_of(parsed.data, self.audio.sample_rate)
        has_text = parsed.text is not None or parsed.token_ids is not None
        target = _ids(parsed, encode, False) if has_text else None
        return ModelInput(
            token_ids=target or self.defaults.start_of(None),
            features=[self.audio.make_feature(clip)],
            suppressed_ids=self.defaults.suppressed_ids,
            begin_suppressed_ids=self.defaults.begin_suppressed_ids,
        )


class PictureReader:
    """For models whose encoder sees: the prompt is the decoder's, and a picture comes beside it."""

    def __init__(
        self, processor: Any, policy: MediaPolicy, defaults: SequenceDefaults, num_tokens: int
    ) -> None:
        """`num_tokens`: of every picture."""
        self._processor = processor
        self._policy = policy
        self._defaults = defaults
        self._num_tokens = num_tokens

    def read(self, parsed: ParsedPrompt, encode: Encode, *, add_special_tokens: bool) -> ModelInput:
        """The picture as a feature, and the tokens with which the decoder starts.

        A decoder's own tokens are written in the prompt, so that none are added.
        """
        del add_special_tokens
        given = images_of(parsed.data)
        if len(given) != 1:
            raise RequestError(
                f'the model sees one picture, {{"image": ...}}; the prompt brings {len(given)}',
                param="multi_modal_data",
            )
        picture = read_image(given[0], self._policy)
        try:
            array = prepared(self._processor, picture)
        # The processor refuses sizes and ratios in errors of its own.
        except Exception as error:
            raise RequestError(
                f"the model's image processor does not take the picture: {error}"[:400],
                param="multi_modal_data",
            ) from error
        has_text = parsed.text is not None or parsed.token_ids is not None
        target = _ids(parsed, encode, False) if has_text else None
        return ModelInput(
            token_ids=self._defaults.start_of(target or None),
            features=[make_feature(IMAGE, {PICTURES: array}, num_tokens=self._num_tokens)],
            suppressed_ids=self._defaults.suppressed_ids,
            begin_suppressed_ids=self._defaults.begin_suppressed_ids,
        )


def _ids(parsed: ParsedPrompt, encode: Encode, add_special_tokens: bool) -> list[int]:
    if parsed.token_ids is not None:
        return parsed.token_ids
    if parsed.text is None:
        raise RequestError("the prompt has no text; give one, or token ids", param="prompt")
    return encode(parsed.text, add_special_tokens=add_special_tokens)


def _clip_of(data: Mapping[str, Any], sample_rate: int) -> AudioClip:
    """The one sound of a prompt: `(samples, rate)`, samples alone, or an AudioClip.

    Raises: RequestError for anything else.
    """
    others = sorted(str(kind) for kind in data if kind != AUDIO)
    if others or AUDIO not in data:
        has = f"has {', '.join(map(repr, others))}" if others else "brings none"
        raise RequestError(
            f'the model hears one sound, {{"audio": (samples, rate)}}; the prompt {has}',
            param="multi_modal_data",
        )
    given = data[AUDIO]
    if isinstance(given, Sequence) and len(given) == 1 and not _is_number(given[0]):
        given = given[0]
    if isinstance(given, AudioClip):
        return given
    if isinstance(given, tuple) and len(given) == 2 and _is_number(given[1]):
        return AudioClip(samples=given[0], sample_rate=int(given[1]))
    return AudioClip(samples=given, sample_rate=sample_rate)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)
