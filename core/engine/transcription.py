"""Sound of any length made text: windows, languages, times.

Without times the windows do not depend on each other and are heard at once, as many as the engine
runs; with times each begins where the last whole segment before it ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quire.core.engine.audio import AudioClip, TranscriptionParams, TranscriptSegment
from quire.core.engine.speech_tokens import read_speech_tokens
from quire.core.engine.transcription_fallback import Heard, verdict_of
from quire.core.errors import QuireError, RequestError
from quire.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy.typing as npt

    from quire.core.engine.facts import EngineFacts
    from quire.core.engine.feature_readers import AudioReader
    from quire.core.engine.tokenizer import TextCodec
    from quire.core.outputs import CompletionOutput, RequestOutput

TIMESTAMP_RULE = "whisper_timestamps"
"""The logits processor that workers of a model that hears have."""
Generate = Callable[..., AsyncIterator["RequestOutput"]]
"""`AsyncEngine.generate`."""
_WINDOWS_AT_ONCE = 8


class Transcriber:
    """Turns clips into segments through one engine."""

    def __init__(
        self, generate: Generate, reader: AudioReader, codec: TextCodec, facts: EngineFacts
    ) -> None:
        self.generate = generate
        self.audio = reader.audio
        self.codec = codec
        self.max_model_len = facts.max_model_len
        self.num_positions = facts.max_source_tokens
        self.tokens = read_speech_tokens(
            facts.model_directory,
            reader.defaults.start_ids[0],
            codec.tokenizer.get_vocab(),
        )

    async def transcribe(
        self, clip: AudioClip, params: TranscriptionParams, request_id: str
    ) -> AsyncIterator[TranscriptSegment]:
        """The segments of a clip in order, as they are recognized.

        Raises: RequestError with the first item, for what cannot be heard or is not known.
        """
        self._refuse(params)
        language_id = None
        if params.language is not None:
            language_id = self.tokens.language_id(params.language)
        samples = await asyncio.to_thread(self.audio.resample, clip)
        run = _Run(self, samples, params, request_id)
        language = params.language
        if language is None and self.tokens.languages:
            language_id = await run.find_language()
            names = {i: name for name, i in self.tokens.languages.items()}
            language = names[language_id]
        prompt = self.tokens.prompt(params, language_id, self._text_before(params))
        segments = run.with_times(prompt) if params.timestamps else run.without_times(prompt)
        async with aclosing(segments) as found:  # type: ignore[type-var]
            async for segment in found:
                yield _in_language(segment, language)

    def _refuse(self, params: TranscriptionParams) -> None:
        if params.word_timestamps:
            raise RequestError(
                "times of words are not told by this engine; ask for those of segments",
                param="timestamp_granularities",
            )
        if params.timestamps and self.tokens.first_timestamp is None:
            raise RequestError(
                "the model tells no times: its generation_config.json has no "
                "no_timestamps_token_id; ask for plain text",
                param="response_format",
            )

    def _text_before(self, params: TranscriptionParams) -> list[int]:
        if not params.prompt:
            return []
        ids = self.codec.encode(" " + params.prompt.strip(), add_special_tokens=False)
        return ids[-max(1, self.max_model_len // 2 - 1) :]


class _Run:
    """One clip on its way."""

    def __init__(
        self,
        owner: Transcriber,
        samples: npt.NDArray[Any],
        params: TranscriptionParams,
        request_id: str,
    ) -> None:
        self._owner = owner
        self._samples = samples
        self._params = params
        self._request_id = request_id
        self._num_asked = 0
        self._rate = owner.audio.sample_rate
        self._window = owner.audio.window_samples

    async def find_language(self) -> int:
        """The token of the language that the first window most likely speaks."""
        tokens = self._owner.tokens
        heard = await self._hear(
            0,
            [tokens.start],
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                allowed_token_ids=sorted(tokens.languages.values()),
                ignore_eos=True,
            ),
        )
        return heard.token_ids[0]

    async def without_times(self, prompt: list[int]) -> AsyncIterator[TranscriptSegment]:
        """One segment for each window; several are heard at once."""
        begins = range(0, len(self._samples), self._window)
        running: dict[int, asyncio.Task[tuple[Heard | None, float]]] = {}
        try:
            for begin in begins:
                for other in begins[begin // self._window :][:_WINDOWS_AT_ONCE]:
                    if other not in running:
                        running[other] = asyncio.create_task(self._believed(other, prompt))
                heard, silence = await running[begin]
                del running[begin]
                if heard is None:
                    continue
                end = min(begin + self._window, len(self._samples))
                yield self._segment(heard, begin / self._rate, end / self._rate, silence)
        finally:
            for task in running.values():
                task.cancel()
            await asyncio.gather(*running.values(), return_exceptions=True)

    async def with_times(self, prompt: list[int]) -> AsyncIterator[TranscriptSegment]:
        """Segments with their own times; a window begins where the last whole one ended."""
        first = self._owner.tokens.first_timestamp
        assert first is not None, self._owner.tokens
        begin = 0
        while begin < len(self._samples):
            silence = await self._no_speech(begin)
            heard, _ = await self._believed(begin, prompt, silence)
            length = min(self._window, len(self._samples) - begin)
            if heard is None:
                begin += length
                continue
            parts, num_done = cut_at_times(
                heard.token_ids, first, length, self._window // self._owner.num_positions
            )
            for part in parts:
                yield self._segment(
                    Heard(
                        token_ids=heard.token_ids[part.begin : part.end],
                        logprobs=heard.logprobs[part.begin : part.end],
                        temperature=heard.temperature,
                    ),
                    (begin + part.start_sample) / self._rate,
                    (begin + part.end_sample) / self._rate,
                    silence,
                )
            begin += num_done

    async def _believed(
        self, begin: int, prompt: list[int], silence: float | None = None
    ) -> tuple[Heard | None, float]:
        """A window heard until it is believed, or as it was at last; None: silence.

        silence: how likely nobody speaks; None: not asked yet, and asked only where it counts.
        """
        params = self._params
        for temperature in (params.temperature, *params.fallback_temperatures):
            heard = await self._hear(begin, prompt, self._sampling(prompt, temperature, begin))
            verdict = verdict_of(heard, self._text_of(heard), params)
            if verdict == "good":
                break
            if verdict == "maybe_silence":
                silence = await self._no_speech(begin) if silence is None else silence
                if silence > params.no_speech_threshold:
                    return None, silence
        return heard, silence or 0.0

    async def _no_speech(self, begin: int) -> float:
        """How likely the model finds it that nobody speaks."""
        tokens = self._owner.tokens
        if tokens.no_speech is None:
            return 0.0
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            allowed_token_ids=[tokens.no_speech],
            ignore_eos=True,
            logprobs=1,
        )
        heard = await self._hear(begin, [tokens.start], params)
        return float(_exp(heard.logprobs[0]))

    async def _hear(self, begin: int, prompt: list[int], params: SamplingParams) -> Heard:
        """The model's answer about the window that begins at a sample."""
        self._num_asked += 1
        name = f"{self._request_id}/{self._num_asked}"
        clip = AudioClip(
            samples=self._samples[begin : begin + self._window], sample_rate=self._rate
        )
        asked = {"prompt_token_ids": prompt, "multi_modal_data": {"audio": clip}}
        outputs: list[RequestOutput] = []
        stream = self._owner.generate(asked, params, name, output_kind="final")
        async with aclosing(stream) as found:  # type: ignore[type-var]
            outputs = [output async for output in found]
        if not outputs or outputs[-1].error is not None:
            why = outputs[-1].error if outputs else "it was ended"
            raise QuireError(f"a window of the sound failed: {why}")
        return _heard(outputs[-1].outputs[0], params.temperature)

    def _sampling(self, prompt: Sequence[int], temperature: float, begin: int) -> SamplingParams:
        limit = self._owner.max_model_len
        return SamplingParams(
            temperature=temperature,
            # The same sound gives the same text each time that it is heard again.
            seed=begin if self._params.fallback_temperatures else None,
            max_tokens=max(1, min(limit // 2, limit - len(prompt))),
            logprobs=1,
            skip_special_tokens=False,
            logits_processors=[TIMESTAMP_RULE] if self._params.timestamps else None,
        )

    def _segment(
        self, heard: Heard, start_s: float, end_s: float, silence: float
    ) -> TranscriptSegment:
        return TranscriptSegment(
            start_s=start_s,
            end_s=end_s,
            text=self._text_of(heard),
            token_ids=heard.token_ids,
            average_logprob=sum(heard.logprobs) / max(1, len(heard.logprobs)),
            no_speech_probability=silence,
            temperature=heard.temperature,
        )

    def _text_of(self, heard: Heard) -> str:
        first = self._owner.tokens.first_timestamp
        ids = [i for i in heard.token_ids if first is None or i < first]
        return self._owner.codec.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedPart:
    """A stretch of a window's tokens, and of its samples."""

    begin: int
    end: int
    start_sample: int
    end_sample: int


def cut_at_times(
    token_ids: Sequence[int], first_timestamp: int, num_samples: int, samples_per_step: int
) -> tuple[list[TimedPart], int]:
    """The segments that a window's tokens tell, and after how many samples the next one begins.

    Two times side by side end one segment and begin the next. What is open at the end is heard
    again with the next window, unless the window ends in a single time: then nothing follows it.
    Source: Radford et al. 2022, section 2.3, and `transcribe` of the program beside it.
    """
    times = [token >= first_timestamp for token in token_ids]

    def sample_of(token: int) -> int:
        return min(num_samples, (token - first_timestamp) * samples_per_step)

    cuts = [i + 1 for i in range(len(times) - 1) if times[i] and times[i + 1]]
    ends_alone = times[-2:] == [False, True]
    if not cuts:
        starts = [token for token, is_time in zip(token_ids, times, strict=True) if is_time]
        start = sample_of(token_ids[0]) if times[:1] == [True] else 0
        end = sample_of(starts[-1]) if len(starts) > 1 else num_samples
        part = TimedPart(
            begin=0, end=len(token_ids), start_sample=start, end_sample=max(start, end)
        )
        return ([part] if token_ids else []), num_samples
    if ends_alone:
        cuts.append(len(token_ids))
    parts = []
    begin = 0
    for end in cuts:
        parts.append(
            TimedPart(
                begin=begin,
                end=end,
                start_sample=sample_of(token_ids[begin]) if times[begin] else 0,
                end_sample=sample_of(token_ids[end - 1]),
            )
        )
        begin = end
    num_done = num_samples if ends_alone else parts[-1].end_sample
    return parts, num_done or num_samples


def _heard(output: CompletionOutput, temperature: float) -> Heard:
    """Tokens and their log-probabilities, without the token that ended them."""
    token_ids = list(output.token_ids)
    logprobs = [next(iter(one.values())).logprob for one in output.logprobs or ()]
    average = sum(logprobs) / max(1, len(logprobs))
    if output.finish_reason == "stop" and output.stop_reason is None and token_ids:
        token_ids, logprobs = token_ids[:-1], logprobs[:-1]
    return Heard(
        token_ids=token_ids,
        logprobs=logprobs[: len(token_ids)],
        average_logprob=average,
        temperature=temperature,
    )


def _exp(value: float) -> float:
    from math import exp

    return exp(min(0.0, value))


def _in_language(segment: TranscriptSegment, language: str | None) -> TranscriptSegment:
    from msgspec.structs import replace

    return replace(segment, language=language)
