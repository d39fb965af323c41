"""Whisper: sound in, the tokens of `generate` out; segments, times, languages, and bad sound."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from tiny_whisper import FIRST_TIME, SAMPLE_RATE, make_tiny_whisper, special_ids

from quire import LLM, AsyncEngine, SamplingParams
from quire.core.config import EngineConfig
from quire.core.engine.audio import AudioClip, TranscriptionParams
from quire.core.engine.audio_features import resample
from quire.core.engine.transcription import cut_at_times
from quire.core.errors import RequestError

NUM_TOKENS = 32
"""Half of the context, as the transcriber asks for at most."""
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_num_seqs": 4, "num_threads": 1,
    "cache_memory_bytes": 8 << 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """The directory of a checkpoint, and its model."""
    directory = tmp_path_factory.mktemp("whisper")
    return directory, make_tiny_whisper(directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(whisper):
    started = await AsyncEngine.start(EngineConfig(model=str(whisper[0]), **SETTINGS))
    yield started
    await started.shutdown()


def sound(num_samples: int = 14_000, seed: int = 3) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(num_samples)
    return (0.1 * noise).astype(np.float32)


def features(directory, samples: np.ndarray) -> torch.Tensor:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor.from_pretrained(directory)
    return extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]


@torch.no_grad()
def greedy(model: Any, heard_features: torch.Tensor, task: str) -> list[int]:
    """One window without times, token by token: `generate` begins another where it sees fit."""
    ids, settings = special_ids(), model.generation_config
    start = ["<|startoftranscript|>", "<|de|>", f"<|{task}|>", "<|notimestamps|>"]
    tokens = [ids[name] for name in start]
    while len(tokens) < len(start) + NUM_TOKENS:
        logits = model(
            input_features=heard_features, decoder_input_ids=torch.tensor([tokens])
        ).logits[0, -1]
        logits[settings.suppress_tokens] = -torch.inf
        if len(tokens) == len(start):
            logits[settings.begin_suppress_tokens] = -torch.inf
        token = int(logits.argmax())
        if token == settings.eos_token_id:
            break
        tokens.append(token)
    return tokens[len(start) :]


async def heard(engine: AsyncEngine, clip: AudioClip, name: str = "a", **params: Any) -> list:
    segments = engine.transcribe(clip, TranscriptionParams(**params), name)
    return [segment async for segment in segments]


def clip_of(samples: np.ndarray, rate: int = SAMPLE_RATE) -> AudioClip:
    return AudioClip(samples=samples, sample_rate=rate)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("timestamps", [True, False])
@pytest.mark.parametrize("task", ["transcribe", "translate"])
async def test_window_gives_the_tokens_of_generate(whisper, engine, timestamps, task):
    """Language, task, times, suppressed and begin-suppressed tokens are as in the original."""
    directory, model = whisper
    if timestamps:
        want = model.generate(
            features(directory, sound()), language="de", task=task,
            return_timestamps=True, max_new_tokens=NUM_TOKENS,
        )[0].tolist()  # fmt: skip
    else:
        want = greedy(model, features(directory, sound()), task)
    segments = await heard(
        engine, clip_of(sound()), language="de", task=task, timestamps=timestamps
    )
    got = [token for segment in segments for token in segment.token_ids]
    if timestamps:
        # The original keeps the time that borders on what it hears again; the first segment
        # has none.
        parts, _ = cut_at_times(want, FIRST_TIME, 14_000, 320)
        want = want[: parts[0].end]
    assert want
    assert got[: len(want)] == want
    assert {segment.language for segment in segments} == {"de"}
    assert not timestamps or got[0] >= FIRST_TIME


@pytest.mark.asyncio(loop_scope="module")
async def test_language_is_found_as_the_original_finds_it(whisper, engine):
    """Without a language, the most likely of the model's is taken and told."""
    directory, model = whisper
    want = int(model.detect_language(features(directory, sound()))[0])
    segments = await heard(engine, clip_of(sound()))
    names = {number: name for name, number in special_ids().items()}
    assert names[want] == f"<|{segments[0].language}|>"


@pytest.mark.asyncio(loop_scope="module")
async def test_long_sound_is_heard_in_windows(whisper, engine):
    """Each window of a clip gives what it gives alone; segments follow each other to the end."""
    whole = sound(40_000)
    segments = await heard(engine, clip_of(whole), language="en")
    parts = [whole[begin : begin + SAMPLE_RATE] for begin in range(0, len(whole), SAMPLE_RATE)]
    alone = [(await heard(engine, clip_of(part), language="en"))[0] for part in parts]
    assert [s.token_ids for s in segments] == [s.token_ids for s in alone]
    assert [s.start_s for s in segments] == [0.0, 1.0, 2.0]
    assert segments[-1].end_s == pytest.approx(2.5)


@pytest.mark.asyncio(loop_scope="module")
async def test_times_go_forward_and_end_with_the_clip(engine):
    """Whatever a random model says, segments are in order and the transcript comes to an end."""
    segments = await heard(engine, clip_of(sound(40_000)), language="en", timestamps=True)
    assert segments
    assert all(0 <= s.start_s <= s.end_s <= 2.5 + 1e-6 for s in segments)
    starts = [segment.start_s for segment in segments]
    assert starts == sorted(starts)
    assert all(0 <= s.no_speech_probability <= 1 for s in segments)


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("clip", "params", "message"),
    [
        (clip_of(sound(0)), {}, "no samples"),
        (clip_of(np.full(100, np.nan, np.float32)), {}, "no finite numbers"),
        (clip_of(np.zeros((2, 100), np.float32)), {}, "mix its channels"),
        (clip_of(sound(), rate=0), {}, "rate of 0"),
        (clip_of(sound()), {"language": "xx"}, "which are de, en, fr"),
        (clip_of(sound()), {"word_timestamps": True}, "times of words"),
    ],
)
async def test_bad_sound_is_refused_and_harms_nobody(engine, clip, params, message):
    """What cannot be heard is a clear error; the next clip is heard."""
    with pytest.raises(RequestError, match=message):
        await heard(engine, clip, **params)
    assert await heard(engine, clip_of(sound()), language="en")
    assert engine.num_unfinished == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_closing_early_ends_what_runs(engine):
    """Who leaves in the middle leaves nothing behind."""
    segments = engine.transcribe(
        clip_of(sound(60_000)), TranscriptionParams(language="en"), "leaver"
    )
    async for _ in segments:
        break
    await segments.aclose()
    assert engine.num_unfinished == 0


@pytest.mark.asyncio(loop_scope="module")
async def test_server_transcribes_with_the_real_engine(engine):
    """A file over HTTP gives the text of the engine, as JSON, as subtitles and translated."""
    import httpx

    from quire.core.serving.http.app import make_app
    from quire.core.serving.settings import ServerSettings

    app = make_app(engine, ServerSettings())
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:

        async def ask(path: str, data: bytes, **fields: str) -> httpx.Response:
            files = {"file": ("a.wav", data)}
            return await client.post(f"/v1/audio/{path}", data=fields, files=files)

        plain = await ask("transcriptions", wav(sound()), language="en")
        assert plain.status_code == 200, plain.text
        quantized = (sound() * 32767).astype("<i2").astype(np.float32) / 32768
        direct = await heard(engine, clip_of(quantized), language="en")
        assert plain.json()["text"] == "".join(s.text for s in direct).strip()
        verbose = await ask(
            "transcriptions", wav(sound()), response_format="verbose_json", language="en"
        )
        assert verbose.json()["segments"][0]["start"] >= 0
        assert verbose.json()["duration"] == pytest.approx(14_000 / SAMPLE_RATE)
        srt = await ask("transcriptions", wav(sound()), response_format="srt")
        assert srt.status_code == 200
        assert " --> " in srt.text
        english = await ask("translations", wav(sound()))
        assert english.status_code == 200, english.text
        for broken in (wav(sound(0)), b"RIFF no sound", b""):
            refused = await ask("transcriptions", broken)
            assert refused.status_code == 400, refused.text
        unknown = await ask("transcriptions", wav(sound()), language="zz")
        assert unknown.status_code == 400
        assert unknown.json()["error"]["param"] == "language"


def wav(samples: np.ndarray) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return target.getvalue()


def test_offline_engine_hears_arrays(whisper):
    """`multi_modal_data` beside a prompt of Whisper's own tokens; several clips at once."""
    directory, model = whisper
    ids = special_ids()
    prompt = "<|startoftranscript|><|fr|><|transcribe|><|notimestamps|>"
    clips = [sound(n, seed=n) for n in (16_000, 9_000, 500, 16_000)]
    with LLM(model=str(directory), **SETTINGS) as llm:
        outputs = llm.generate(
            [{"prompt": prompt, "multi_modal_data": {"audio": (one, 16_000)}} for one in clips],
            SamplingParams(temperature=0, max_tokens=NUM_TOKENS),
            use_tqdm=False,
        )
        assert list(outputs[0].prompt_token_ids) == [
            ids["<|startoftranscript|>"], ids["<|fr|>"], ids["<|transcribe|>"],
            ids["<|notimestamps|>"],
        ]  # fmt: skip
        for one, output in zip(clips, outputs, strict=True):
            want = model.generate(
                features(directory, one), language="fr", task="transcribe",
                max_new_tokens=NUM_TOKENS,
            )[0].tolist()  # fmt: skip
            assert output.outputs[0].token_ids[: len(want)] == want
        for data, message in (
            ({}, "brings none"),
            ({"image": 1}, "brings 'image'"),
            ({"audio": (sound(20_000), 16_000)}, "hears 1 s at once"),
            ({"audio": "no sound"}, "no array"),
        ):
            with pytest.raises(RequestError, match=message):
                llm.generate({"prompt": prompt, "multi_modal_data": data}, use_tqdm=False)


def test_resampling_keeps_a_tone():
    """A tone below both limits is the same tone at another rate; one above is taken out."""
    for rate, wanted in ((44_100, 16_000), (8_000, 16_000), (48_000, 16_000)):
        times = np.arange(rate) / rate
        got = resample(np.sin(2 * np.pi * 440 * times).astype(np.float32), rate, wanted)
        expected = np.sin(2 * np.pi * 440 * np.arange(len(got)) / wanted)
        assert len(got) == wanted
        assert np.abs(got - expected)[400:-400].max() < 1e-3
    high = np.sin(2 * np.pi * 12_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(resample(high, 48_000, 16_000))[400:-400].max() < 1e-2


@pytest.mark.parametrize(
    ("tokens", "parts", "num_done"),
    [
        ([100, 1, 2, 110], [(0, 4, 0, 3200)], 16_000),  # one segment with a time at each end
        ([100, 1, 110, 110, 2, 130], [(0, 3, 0, 3200), (3, 6, 3200, 9600)], 16_000),
        ([100, 1, 110, 110, 2], [(0, 3, 0, 3200)], 3200),  # the open rest is heard again
        ([1, 2], [(0, 2, 0, 16_000)], 16_000),
        ([100, 100, 1], [(0, 1, 0, 0)], 16_000),  # never stands still
        ([], [], 16_000),
    ],
)
def test_times_cut_a_window_into_segments(tokens, parts, num_done):
    """Two times side by side are a border; the last border is where the next window begins."""
    found, done = cut_at_times(tokens, 100, 16_000, 320)
    assert [(p.begin, p.end, p.start_sample, p.end_sample) for p in found] == parts
    assert done == num_done
