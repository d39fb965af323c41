"""Transcripts in the forms that clients ask for."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pydantic_core

from quire.core.engine.audio import TranscriptionParams, TranscriptSegment
from quire.core.engine.transcription_fallback import compression_ratio
from quire.core.serving.protocol.audio import (
    DurationUsage,
    TranscribedSegment,
    TranscribedWord,
    Transcript,
    VerboseTranscript,
)


def text_of(segments: Sequence[TranscriptSegment]) -> str:
    """All of the text."""
    return "".join(segment.text for segment in segments).strip()


def plain(segments: Sequence[TranscriptSegment], duration_s: float) -> Transcript:
    """`json`."""
    return Transcript(text=text_of(segments), usage=_usage(duration_s))


def verbose(
    segments: Sequence[TranscriptSegment],
    params: TranscriptionParams,
    duration_s: float,
    *,
    tells_segments: bool,
    tells_words: bool,
) -> VerboseTranscript:
    """`verbose_json`."""
    found = next((segment.language for segment in segments if segment.language), None)
    answer = VerboseTranscript(
        task=params.task,
        language=params.language or found or "unknown",
        duration=duration_s,
        text=text_of(segments),
        usage=_usage(duration_s),
    )
    if tells_segments:
        answer.segments = [_segment(index, segment) for index, segment in enumerate(segments)]
    if tells_words:
        answer.words = [
            TranscribedWord(word=word.word, start=word.start_s, end=word.end_s)
            for segment in segments
            for word in segment.words
        ]
    return answer


def srt(segments: Sequence[TranscriptSegment]) -> str:
    """SubRip: numbered, with commas in times."""
    blocks = [
        f"{number}\n{_time(s.start_s, ',')} --> {_time(s.end_s, ',')}\n{_cue(s)}\n"
        for number, s in enumerate(segments, start=1)
    ]
    return "\n".join(blocks)


def vtt(segments: Sequence[TranscriptSegment]) -> str:
    """WebVTT: a head, and points in times."""
    blocks = [f"{_time(s.start_s, '.')} --> {_time(s.end_s, '.')}\n{_cue(s)}\n" for s in segments]
    return "\n".join(["WEBVTT\n", *blocks])


async def events(
    segments: AsyncIterator[TranscriptSegment], duration_s: float
) -> AsyncGenerator[bytes]:
    """The JSON of `transcript.text.delta` for each segment, and of `transcript.text.done`."""
    found: list[TranscriptSegment] = []
    async with aclosing(segments) as stream:  # type: ignore[type-var]
        async for segment in stream:
            # As the whole text: no space before the first word.
            delta = segment.text if found else segment.text.lstrip()
            found.append(segment)
            yield _json(type="transcript.text.delta", delta=delta)
    usage = {"type": "duration", "seconds": _seconds(duration_s)}
    yield _json(type="transcript.text.done", text=text_of(found), usage=usage)


def _json(**fields: Any) -> bytes:
    return pydantic_core.to_json(fields)


def _usage(duration_s: float) -> DurationUsage:
    return DurationUsage(type="duration", seconds=_seconds(duration_s))


def _seconds(duration_s: float) -> int:
    return math.ceil(duration_s)


def _segment(index: int, segment: TranscriptSegment) -> TranscribedSegment:
    return TranscribedSegment(
        id=index,
        seek=round(segment.start_s * 100),
        start=segment.start_s,
        end=segment.end_s,
        text=segment.text,
        tokens=segment.token_ids,
        temperature=segment.temperature,
        avg_logprob=segment.average_logprob,
        # High where a text repeats itself, which is how a model that lost its way is noticed.
        compression_ratio=compression_ratio(segment.text),
        no_speech_prob=segment.no_speech_probability,
    )


def _cue(segment: TranscriptSegment) -> str:
    """A cue ends at an empty line, and an arrow would read as times."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _time(seconds: float, point: str) -> str:
    total_ms = round(seconds * 1000)
    hours, rest = divmod(total_ms, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, milliseconds = divmod(rest, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{point}{milliseconds:03d}"
