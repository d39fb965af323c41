"""Windows that are not believed are heard again at higher temperatures, or are silence."""

from __future__ import annotations

import numpy as np
import pytest
import pytest_asyncio
from tiny_whisper import SAMPLE_RATE, make_tiny_whisper

from quire import AsyncEngine
from quire.core.config import EngineConfig
from quire.core.engine.audio import FALLBACK_TEMPERATURES, AudioClip, TranscriptionParams
from quire.core.engine.transcription_fallback import Heard, compression_ratio, verdict_of

TEMPERATURES = (0.4, 0.8)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whisper")
    make_tiny_whisper(directory)
    config = EngineConfig(
        model=str(directory), device="cpu", dtype="float32", num_threads=1,
        cache_memory_bytes=8 << 20,
    )  # fmt: skip
    started = await AsyncEngine.start(config)
    yield started
    await started.shutdown()


async def heard(engine: AsyncEngine, name: str, seconds: float = 0.9, **params) -> list:
    noise = np.random.default_rng(3).standard_normal(int(seconds * SAMPLE_RATE))
    clip = AudioClip(samples=(0.1 * noise).astype(np.float32), sample_rate=SAMPLE_RATE)
    asked = TranscriptionParams(language="en", **params)
    return [segment async for segment in engine.transcribe(clip, asked, name)]


@pytest.mark.parametrize(
    ("average", "text", "want"),
    [
        (-0.5, "the quick brown fox", "good"),
        (-1.0, "the quick brown fox", "good"),
        (-1.01, "the quick brown fox", "maybe_silence"),
        (-0.5, "la la " * 40, "again"),
        (-2.0, "la la " * 40, "maybe_silence"),
        (0.0, "", "good"),
    ],
)
def test_window_is_believed_by_likelihood_and_repetition(average, text, want):
    """The thresholds of Whisper's authors: -1 by token on average, and 2.4 in compression."""
    one = Heard(token_ids=[1], logprobs=[average], average_logprob=average)
    params = TranscriptionParams(fallback_temperatures=FALLBACK_TEMPERATURES)
    assert verdict_of(one, text, params) == want
    assert verdict_of(one, text, TranscriptionParams()) == "good"


def test_text_that_repeats_itself_compresses_better():
    """A loop of one word is beyond the threshold, and a sentence is not."""
    assert compression_ratio("no " * 50) > 2.4 > compression_ratio("Not twice the same word here.")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("timestamps", [True, False])
async def test_unbelieved_window_is_heard_at_every_temperature(engine, timestamps):
    """What no temperature makes likely is told as it was heard last, the same each time."""
    params = {
        "fallback_temperatures": TEMPERATURES, "logprob_threshold": 0.1,
        "no_speech_threshold": 1.1, "timestamps": timestamps,
    }  # fmt: skip
    first = await heard(engine, "a", **params)
    again = await heard(engine, "b", **params)
    assert {segment.temperature for segment in first} == {TEMPERATURES[-1]}
    assert [s.token_ids for s in first] == [s.token_ids for s in again]


@pytest.mark.asyncio(loop_scope="module")
async def test_believed_window_is_heard_once(engine):
    """Thresholds that everything passes leave the greedy text."""
    params = {"logprob_threshold": -1e9, "compression_ratio_threshold": 1e9}
    plain = await heard(engine, "a")
    kept = await heard(engine, "b", fallback_temperatures=TEMPERATURES, **params)
    assert [s.token_ids for s in kept] == [s.token_ids for s in plain]
    assert {segment.temperature for segment in kept} == {0.0}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("timestamps", [True, False])
async def test_silence_is_left_out_and_the_rest_goes_on(engine, timestamps):
    """Unlikely windows in which nobody speaks give no segment, and the clip comes to its end."""
    params = {
        "fallback_temperatures": TEMPERATURES, "logprob_threshold": 0.1,
        "no_speech_threshold": -1.0, "timestamps": timestamps,
    }  # fmt: skip
    assert await heard(engine, "a", seconds=2.5, **params) == []
    assert engine.num_unfinished == 0
