"""Encoders that hear more of more sound, or see: they are measured, and their tokens are `generate`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import seq2seq_matrix  # noqa: E402
from tiny_models import make_tiny_tokenizer  # noqa: E402
from tiny_seq2seq import make_tiny_seq2seq, tiny_extractor  # noqa: E402

from quire import LLM, AsyncEngine, SamplingParams  # noqa: E402
from quire.core.config import EngineConfig  # noqa: E402
from quire.core.engine.audio import AudioClip, TranscriptionParams  # noqa: E402
from quire.core.engine.audio_features import AudioFeatures  # noqa: E402
from quire.core.errors import CheckpointError, RequestError, UnsupportedError  # noqa: E402
from quire.core.models.seq2seq.example_sources import measure_steps  # noqa: E402
from quire.core.source_features import SourceSteps  # noqa: E402

QUICK = ("speech_to_text", "fsmt", "vision-encoder-decoder")
MORE = (
    "moonshine", "moonshine_streaming", "speecht5", "speech-encoder-decoder", "canary",
    "cohere_asr", "t5gemma2",
)  # fmt: skip
RATE = 16_000
SETTINGS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "max_num_seqs": 4, "num_threads": 1,
    "cache_memory_bytes": 8 << 20, "max_model_len": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", QUICK)
def test_engine_gives_the_tokens_of_generate(name) -> None:
    """Sounds of several lengths at once, in chunks and preempted, as in the matrix of the docs."""
    assert seq2seq_matrix.run_seq2seq(name)["status"] == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_engine_gives_the_tokens_of_generate_for_more(name) -> None:
    """The same for encoders of raw samples, of whole groups of them, and of two models joined."""
    assert seq2seq_matrix.run_seq2seq(name)["status"] == "exact"


@dataclass(frozen=True)
class Stack:
    """Convolutions one after the other, over groups of frames."""

    layers: tuple[tuple[int, int, int], ...]
    """Kernel, stride and padding of each."""
    multiple: int

    def tokens_of(self, num_frames: int) -> int:
        if num_frames % self.multiple:
            raise RuntimeError("shape is invalid")
        length = num_frames // self.multiple
        for kernel, stride, padding in self.layers:
            if length + 2 * padding < kernel:
                raise RuntimeError("kernel size can't be greater than actual input size")
            length = (length + 2 * padding - kernel) // stride + 1
        return length


LAYER = st.integers(1, 9).flatmap(
    lambda kernel: st.tuples(
        st.just(kernel), st.integers(1, 7), st.integers(0, min(3, (kernel - 1) // 2))
    )
)


@settings(max_examples=100, deadline=None)
@given(
    stack=st.builds(
        Stack,
        layers=st.lists(LAYER, min_size=1, max_size=3).map(tuple),
        multiple=st.sampled_from([1, 2, 80]),
    ),
    data=st.data(),
)
def test_steps_are_those_of_any_stack_of_convolutions(stack, data) -> None:
    """Two numbers and a multiple say the tokens of every length, measured at a few."""
    steps = measure_steps(stack.tokens_of, 6_000 * stack.multiple)
    assert steps is not None
    assert steps.multiple == stack.multiple
    num_groups = data.draw(st.integers(6_000, 30_000))
    num_frames = num_groups * stack.multiple
    assert steps.tokens_of(num_frames) == stack.tokens_of(num_frames)
    assert steps.usable(num_frames + stack.multiple - 1) == num_frames


def test_steps_that_are_not_even_are_none() -> None:
    """What is no such encoder is not taken for one."""
    assert measure_steps(lambda n: int(n**0.5), 16_000) is None
    assert measure_steps(lambda _: 50, 16_000) is None


@pytest.fixture(scope="module")
def hearing(tmp_path_factory):
    """A checkpoint of an encoder of any length, with a tokenizer, and its model."""
    from transformers import GenerationConfig

    directory = tmp_path_factory.mktemp("hearing")
    model = make_tiny_seq2seq("speech_to_text")
    model.generation_config = GenerationConfig(
        decoder_start_token_id=0, bos_token_id=0, pad_token_id=2, eos_token_id=1
    )
    model.save_pretrained(directory)
    tiny_extractor(model).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory, model


def noise(seconds: float, seed: int = 1) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (0.1 * samples).astype(np.float32)


@pytest.mark.asyncio
async def test_transcriptions_are_what_generate_writes(hearing) -> None:
    """Sound through the engine for speech, longer than a window too, without tokens of Whisper's."""
    directory, model = hearing
    engine = await AsyncEngine.start(EngineConfig(model=str(directory), **SETTINGS))
    try:
        samples = noise(31.0)
        params = TranscriptionParams(timestamps=False, temperature=0.0)
        clip = AudioClip(samples=samples, sample_rate=RATE)
        segments = [one async for one in engine.transcribe(clip, params, "a")]
    finally:
        await engine.shutdown()
    assert [(one.start_s, one.end_s) for one in segments] == [(0.0, 30.0), (30.0, 31.0)]
    extractor = tiny_extractor(model)
    for segment, part in zip(segments, (samples[: 30 * RATE], samples[30 * RATE :]), strict=True):
        made = extractor(part, sampling_rate=RATE, return_tensors="pt")
        count = len(segment.token_ids)
        want = model.generate(**made, max_new_tokens=count, do_sample=False)[0].tolist()
        assert list(segment.token_ids) == want[1 : count + 1]


def test_sounds_too_short_or_too_long_are_refused_by_name(hearing) -> None:
    """Nothing is heard of a few samples; a window is as long as the encoder takes."""
    audio = AudioFeatures(str(hearing[0]), 20, SourceSteps(4, 0))
    with pytest.raises(RequestError, match="too short"):
        audio.make_feature(AudioClip(samples=noise(0.05), sample_rate=RATE))
    assert 0.75 < audio.window_s < 0.85
    with pytest.raises(RequestError, match=r"hears 1 s at once"):
        audio.make_feature(AudioClip(samples=noise(2.0), sample_rate=RATE))
    feature = audio.make_feature(AudioClip(samples=noise(0.5), sample_rate=RATE))
    (array,) = feature.arrays.values()
    assert feature.num_tokens == array.shape[0] // 4


def test_checkpoint_without_feature_extractor_is_refused_with_the_cause(tmp_path) -> None:
    """Not at the first sound, but when it is loaded."""
    make_tiny_seq2seq("moonshine").save_pretrained(tmp_path)
    with pytest.raises((CheckpointError, UnsupportedError), match="feature extractor"):
        LLM(model=str(tmp_path), **SETTINGS)


def test_pictures_beside_a_decoder_are_refused_by_name_where_they_are_none(tmp_path) -> None:
    """One picture a prompt, that can be read; nothing else in flight is harmed."""
    model = make_tiny_seq2seq("vision-encoder-decoder")
    model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(tmp_path)
    (asked, _) = seq2seq_matrix._asked(model, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with LLM(model=str(tmp_path), **SETTINGS) as llm:
        for data in ({}, {"image": [asked[0]["multi_modal_data"]["image"]] * 2}, {"audio": [1.0]}):
            with pytest.raises(RequestError, match=r"picture|images"):
                llm.generate([{"prompt_token_ids": [0], "multi_modal_data": data}], params)
        with pytest.raises(RequestError, match="image"):
            llm.generate([{"prompt_token_ids": [0], "multi_modal_data": {"image": b"GIF"}}], params)
        (output,) = llm.generate(asked[:1], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_source_is_not_written_to_twice(tmp_path) -> None:
    """A decoder that adds positions to what the encoder made adds them once, whoever runs again."""
    model = make_tiny_seq2seq("moonshine_streaming")
    model.generation_config.decoder_start_token_id = 0
    model.save_pretrained(tmp_path)
    tiny_extractor(model).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompt = {"prompt_token_ids": [0], "multi_modal_data": {"audio": (noise(0.6), RATE)}}
    with LLM(model=str(tmp_path), **SETTINGS) as llm:
        alone = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
        both = llm.generate([prompt, prompt], params, use_tqdm=False)
    assert all(list(one.outputs[0].token_ids) == list(alone) for one in both)
