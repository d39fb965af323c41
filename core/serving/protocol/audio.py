"""`/v1/audio/transcriptions` and `/v1/audio/translations`: forms and answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from quire.core.errors import RequestError
from quire.core.serving.protocol.base import RequestBody, ResponseBody

TranscriptFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]


class TranslationForm(RequestBody):
    """Fields beside the file. A form has texts only, so numbers come in quotes."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)

    model: str | None = None
    prompt: str | None = Field(default=None, max_length=10_000)
    response_format: TranscriptFormat = "json"
    temperature: float = Field(default=0.0, ge=0.0, le=1.0)


class TranscriptionForm(TranslationForm):
    """Fields beside the file, where the text stays in its language."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "chunking_strategy": ("auto",),
        "include": ([],),
        "keywords": ([],),
        "known_speaker_names": ([],),
        "known_speaker_references": ([],),
        "languages": ([],),
    }

    language: str | None = Field(default=None, pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})?$")
    stream: bool = False
    timestamp_granularities: list[Literal["word", "segment"]] | None = None

    @property
    def tells_words(self) -> bool:
        """Whether each word has its times."""
        return "word" in (self.timestamp_granularities or ())

    @property
    def tells_segments(self) -> bool:
        """Whether segments are told; None asked for: they are."""
        return not self.timestamp_granularities or "segment" in self.timestamp_granularities

    def check(self) -> None:
        """Raises: RequestError for fields that contradict each other."""
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise RequestError(
                "timestamp_granularities needs response_format=verbose_json",
                param="timestamp_granularities",
            )
        if self.stream and self.response_format not in {"json", "text"}:
            raise RequestError(
                f"response_format {self.response_format} is not streamed; choose json or text",
                param="response_format",
            )


class DurationUsage(ResponseBody):
    """What was heard."""

    type: Literal["duration"]
    seconds: int


class Transcript(ResponseBody):
    """The text."""

    text: str
    usage: DurationUsage


class TranscribedWord(ResponseBody):
    """A word and its times in seconds."""

    word: str
    start: float
    end: float


class TranscribedSegment(ResponseBody):
    """A stretch of the sound, with times in seconds."""

    id: int
    seek: int
    start: float
    end: float
    text: str
    tokens: list[int]
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float


class VerboseTranscript(ResponseBody):
    """The text and where it comes from."""

    task: Literal["transcribe", "translate"]
    language: str
    duration: float
    text: str
    segments: list[TranscribedSegment] | None = None
    words: list[TranscribedWord] | None = None
    usage: DurationUsage
