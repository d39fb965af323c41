"""What is asked of a model that hears, and what it answers.

`AsyncEngine.transcribe` is the way in: a clip, and segments as they are recognized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioClip:
    """Sound as it was recorded; the engine resamples it to what its model takes."""

    samples: Any
    """float32 [num_samples], a numpy array in [-1, 1], all channels mixed into one."""
    sample_rate: int
    """Samples a second."""

    @property
    def duration_s(self) -> float:
        """How long it plays."""
        return len(self.samples) / self.sample_rate


class TranscriptionParams(msgspec.Struct, frozen=True, kw_only=True):
    """How sound becomes text."""

    task: Literal["transcribe", "translate"] = "transcribe"
    """`translate`: into English."""
    language: str | None = None
    """What is spoken, as two or three letters (`de`); None: the model finds out."""
    prompt: str | None = None
    """Text that came before, for names and style."""
    temperature: float = 0.0
    timestamps: bool = False
    """Whether the times of segments are wanted; without, they may be those of whole windows."""
    word_timestamps: bool = False
    fallback_temperatures: tuple[float, ...] = ()
    """At which a window is heard again that is not believed, one after the other; empty: whatever
    is heard first is told, and no threshold counts."""
    compression_ratio_threshold: float = 2.4
    """A text that compresses better repeats itself, and is not believed."""
    logprob_threshold: float = -1.0
    """What is less likely on average, by token, is not believed."""
    no_speech_threshold: float = 0.6
    """Likelier silence is left out, where what was heard is not believed."""


FALLBACK_TEMPERATURES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Those of Whisper's authors, after 0."""


class TranscriptWord(msgspec.Struct, frozen=True, kw_only=True):
    """One word and when it is said, in seconds from the beginning of the clip."""

    word: str
    start_s: float
    end_s: float


class TranscriptSegment(msgspec.Struct, frozen=True, kw_only=True):
    """A stretch of the clip, in order; the texts of all of them, joined, are the transcript."""

    start_s: float
    end_s: float
    text: str
    """With the space before it, where there is one."""
    token_ids: list[int]
    language: str | None = None
    """As given, or as found."""
    average_logprob: float = 0.0
    no_speech_probability: float = 0.0
    temperature: float = 0.0
    """At which it was heard."""
    words: list[TranscriptWord] = []
