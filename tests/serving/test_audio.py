"""Transcriptions: the forms of answers, the limits of files, and models that hear nothing."""

from __future__ import annotations

import io
import json
import wave

import pytest
from asking import connected, error_of, events_of, served_in_thread
from fake_engine import FakeEngine, facts
from openai import OpenAI

from quire.core.errors import RequestError
from quire.core.serving.audio_files import read_audio

TRANSCRIPTIONS, TRANSLATIONS = "/v1/audio/transcriptions", "/v1/audio/translations"


def wav(num_samples: int = 1600, channels: int = 1, rate: int = 16000) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(b"\x00\x40" * num_samples * channels)
    return target.getvalue()


def hearing_engine() -> FakeEngine:
    return FakeEngine(facts=facts(tasks=["transcribe"]))


@pytest.fixture
async def hearing():
    async with connected(hearing_engine()) as client:
        yield client


async def ask(client, path=TRANSCRIPTIONS, file=None, **fields):
    return await client.post(path, data=fields, files={"file": ("a.wav", file or wav())})


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, TRANSLATIONS])
async def test_model_without_audio_refuses_by_name(client, path):
    """A model that hears nothing says so."""
    error = error_of(await ask(client, path), 400)
    assert (error["param"], "hears no audio" in error["message"]) == ("model", True)


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the library's own models
def test_openai_transcription_is_understood():
    """The library uploads, and reads text, segments and words."""
    engine = hearing_engine()
    with (
        served_in_thread(engine) as address,
        OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client,
    ):
        asked = {"model": "fake", "file": ("a.wav", wav())}
        assert client.audio.transcriptions.create(**asked, language="en").text == "hello there"
        verbose = client.audio.transcriptions.create(
            **asked, response_format="verbose_json", timestamp_granularities=["word", "segment"]
        )
        assert [(word.word, word.start) for word in verbose.words] == [("hello", 0), ("there", 1)]
        assert [segment.text for segment in verbose.segments] == [" hello", " there"]
        assert verbose.duration == pytest.approx(0.1)
        events = list(client.audio.transcriptions.create(**asked, stream=True))
        assert [event.type for event in events] == [
            "transcript.text.delta",
            "transcript.text.delta",
            "transcript.text.done",
        ]
        assert "".join(event.delta for event in events[:2]) == events[2].text == "hello there"
        client.audio.translations.create(**asked)
    clip, params = engine.heard[0]
    assert (clip.sample_rate, len(clip.samples), params.language) == (16000, 1600, "en")
    assert clip.samples[0] == pytest.approx(0.5)
    assert engine.heard[-1][1].task == "translate"


async def test_transcription_formats(hearing):
    """SubRip has commas and numbers, WebVTT a head and points, text neither."""
    assert (await ask(hearing, response_format="text")).text == "hello there\n"
    srt = (await ask(hearing, response_format="srt")).text
    assert srt.split("\n\n")[0] == "1\n00:00:00,000 --> 00:00:00,500\nhello"
    vtt = await ask(hearing, response_format="vtt")
    assert vtt.headers["content-type"].startswith("text/vtt")
    assert vtt.text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:00.500\nhello\n")


@pytest.mark.parametrize("form", ["json", "text", "srt", "vtt", "verbose_json"])
async def test_translation_takes_the_forms_of_transcription(hearing, form):
    """The second endpoint answers alike; of the languages only the task is another."""
    spoken = await ask(hearing, response_format=form)
    translated = await ask(hearing, TRANSLATIONS, response_format=form)
    assert (spoken.status_code, translated.status_code) == (200, 200)
    assert translated.headers["content-type"] == spoken.headers["content-type"]
    if form == "verbose_json":
        assert translated.json()["segments"] == spoken.json()["segments"]
    else:
        assert translated.text == spoken.text


async def test_translation_refuses_what_only_transcription_has(hearing):
    """A translation has no language to choose, no words' times and no stream: named, not dropped."""
    for name, value in (("language", "en"), ("timestamp_granularities[]", "word"), ("stream", "1")):
        error = error_of(await ask(hearing, TRANSLATIONS, **{name: value}), 400)
        assert error["param"] == name.removesuffix("[]")


async def test_transcription_streams_events(hearing):
    """A stream ends with the whole text."""
    events = events_of(await ask(hearing, stream="true"))
    assert events[-1]["text"] == "hello there"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "xml"}, "response_format"),
        ({"temperature": "2"}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"language": "english!"}, "language"),
        ({"stream": "true", "response_format": "srt"}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"include[]": "logprobs"}, "include"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy"),
        ({"nonsense": "1"}, "nonsense"),
    ],
)
async def test_transcription_bad_field_is_refused_by_name(hearing, fields, param):
    """Every refusal names the field."""
    assert error_of(await ask(hearing, **fields), 400)["param"] == param


async def test_transcription_of_no_sound_is_refused(hearing):
    """What is no sound, no file and no form is the client's error."""
    for data in (b"no sound", b"", wav(0), wav()[:20]):
        assert error_of(await ask(hearing, file=data or b" "), 400)["param"] == "file"
    response = await hearing.post(TRANSCRIPTIONS, content=json.dumps({"file": "a"}))
    assert error_of(response, 400)["param"] == "file"
    kind = {"content-type": "multipart/form-data; boundary=x"}
    broken = await hearing.post(TRANSCRIPTIONS, content=b"--y\r\nnonsense", headers=kind)
    error_of(broken, 400)
    error_of(await hearing.post(TRANSCRIPTIONS, data={"model": "fake"}, files={"a": b"1"}), 400)


async def test_transcription_that_is_too_large_is_413():
    """The limit of bodies holds for files."""
    async with connected(hearing_engine(), max_body_bytes=1000) as client:
        error_of(await ask(client), 413)


def test_sound_that_is_too_long_is_refused_before_it_is_decoded():
    """The length is read from the head; channels are mixed into one."""
    with pytest.raises(RequestError, match="at most"):
        read_audio(wav(16001), max_duration_s=1.0)
    clip = read_audio(wav(10, channels=2))
    assert clip.samples.shape == (10,)
    assert clip.samples[0] == pytest.approx(0.5)
