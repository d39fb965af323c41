"""Decoders that take sound among their tokens, held against transformers' own generation."""

from __future__ import annotations

import asyncio
import base64
import io
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import openai
import pytest
from asking import connected
from hearing_cases import sound_cases
from tiny_hearing import MARK, RATE, make_hearer, make_hearing_model, make_sound

from quire import LLM, SamplingParams
from quire.core.config import EngineConfig
from quire.core.engine.async_engine import AsyncEngine
from quire.core.errors import RequestError, UnsupportedError
from quire.core.models.registry import describe

SETTINGS = {
    "device": "cpu", "dtype": "float32", "max_model_len": 160, "max_num_seqs": 4,
    "block_size": 16, "num_threads": 1, "cache_memory_bytes": 1 << 22,
}  # fmt: skip
TEXT = f"a cat {MARK} what is said"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny Qwen2-Audio with its processor."""
    return make_hearing_model("qwen2_audio", tmp_path_factory.mktemp("qwen2_audio"))


@pytest.fixture(scope="module")
def llm(directory):
    """It, in steps so small that chunks end within sounds."""
    with LLM(model=str(directory), max_num_batched_tokens=7, **SETTINGS) as llm:
        yield llm


def tokens_of(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_prompts_with_sound_in_chunks_and_from_prefixes_equal_generate(llm, directory):
    """One, two and no sounds at once; the second time from the cache of prefixes."""
    asked, expected, _ = sound_cases(directory)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert tokens_of(outputs) == [row[:8] for row in expected]
    assert any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((np.zeros(0, np.float32), RATE), "no samples"),
        ((np.full(4_000, np.nan, np.float32), RATE), "finite"),
        (np.zeros((2, 4_000), np.float32), "channels"),
        ([(make_sound(1), RATE), (make_sound(2), RATE)], "placeholders"),
    ],
)
def test_sound_that_is_none_is_refused_beside_others(llm, given, message):
    """Whatever is wrong with a sound ends its own request with a reason."""
    with pytest.raises(RequestError, match=message):
        llm.generate({"prompt": TEXT, "multi_modal_data": {"audio": given}}, use_tqdm=False)
    good = {"prompt": TEXT, "multi_modal_data": {"audio": (make_sound(1), RATE)}}
    assert llm.generate(good, SamplingParams(max_tokens=2), use_tqdm=False)


def wav(samples: np.ndarray) -> str:
    """A WAV file in base64."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return base64.b64encode(buffer.getvalue()).decode()


def asking(part: dict) -> list[dict]:
    content = [part, {"type": "text", "text": "what is said"}]
    return [{"role": "user", "content": content}]


def input_audio(data: str) -> dict:
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


@pytest.fixture
async def client(directory) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client of a server around it."""
    engine = await AsyncEngine.start(EngineConfig.from_user(model=str(directory), **SETTINGS))
    try:
        async with connected(engine) as http:
            name = (await http.get("/v1/models")).json()["data"][0]["id"]
            asked = openai.AsyncOpenAI(
                api_key="none", base_url="http://server/v1", http_client=http, max_retries=0
            )
            asked.model = name
            yield asked
    finally:
        await engine.shutdown()


async def test_conversation_with_sound_answers_while_broken_sound_is_refused(client, llm):
    """The tokens are those of the same prompt offline; broken sound harms no open stream."""
    samples = make_sound(1)
    answer = await client.chat.completions.create(
        model=client.model, messages=asking(input_audio(wav(samples))), temperature=0, max_tokens=6
    )
    heard = (np.clip(samples, -1, 1) * 32767).astype("<i2").astype(np.float32) / 32768
    prompt = {
        "prompt": f"user : {MARK} what is said assistant :",
        "multi_modal_data": {"audio": (heard, RATE)},
    }
    params = SamplingParams(temperature=0, max_tokens=6)
    (expected,) = llm.generate(prompt, params, use_tqdm=False)
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    stream = await client.chat.completions.create(
        model=client.model, messages=asking({"type": "audio_url", "audio_url": {
            "url": "data:audio/wav;base64," + wav(samples)}}),
        temperature=0, max_tokens=60, stream=True, extra_body={"ignore_eos": True},
    )  # fmt: skip
    await anext(stream)
    bad = {
        "no sound": input_audio(wav(samples[:0])),
        "no sound that this server reads": input_audio(base64.b64encode(b"RIFFxxxx").decode()),
        "base64": input_audio("!!"),
        "private network": {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:1/x.wav"}},
    }
    answers = await asyncio.gather(*(
        client.chat.completions.create(model=client.model, messages=asking(part))
        for part in bad.values()
    ), return_exceptions=True)  # fmt: skip
    for message, error in zip(bad, answers, strict=True):
        assert isinstance(error, openai.BadRequestError), error
        assert message in str(error)
    reasons = [c.choices[0].finish_reason async for c in stream if c.choices]
    assert reasons[-1] == "length"


def test_model_that_reads_codes_of_sound_at_each_place_is_refused(tmp_path):
    """Its text is never run without the codes, whatever the length of a prompt lets through."""
    make_hearer("kyutai_speech_to_text").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="several ids at each place"):
        describe(tmp_path)
