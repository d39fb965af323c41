"""An engine without a model: it answers each prompt with a text that the test chose, one byte a token.

It keeps to what `AsyncEngine` promises, so that the server is tested without torch, without a process and in no time.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quire.core.config import EngineConfig
from quire.core.engine.async_engine import QueueFullError
from quire.core.engine.audio import TranscriptSegment, TranscriptWord
from quire.core.engine.facts import EngineFacts, EngineStatistics
from quire.core.engine.pooling import PoolingOutput, check_task
from quire.core.errors import EngineDeadError, RequestError
from quire.core.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput

BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 260
REPLY = "Hello, world"
NUM_DIMENSIONS = 8
TRANSCRIPT = ("hello", "there")


def facts(**changes) -> EngineFacts:
    settings = {
        "model": "/models/fake",
        "served_model_name": "fake",
        "model_directory": "/models/fake",
        "architecture": "FakeForCausalLM",
        "vocab_size": VOCAB_SIZE,
        "max_model_len": 512,
        "num_parameters": 1,
        "weight_bytes": 4,
        "dtype": "float32",
        "device": "null",
        "device_name": "nothing",
        "num_blocks": [64],
        "num_cache_tokens": 1024,
        "providers": {},
        "changes": [],
        "startup_s": {},
    }
    return EngineFacts(**{**settings, **changes})


@dataclass
class Submitted:
    """What the server handed over."""

    prompt: object
    params: object
    request_id: str
    output_kind: str
    add_special_tokens: bool


@dataclass
class FakeEngine:
    reply: Callable[[Sequence[int], int], str] = lambda prompt_ids, index: REPLY
    """(prompt token ids, output index) to the text that the model says before it ends."""
    hold: asyncio.Event | None = None
    """Given: after `hold_after` tokens every request waits for it."""
    hold_after: int = 1
    queue_limit: int | None = None
    fail_at: int | None = None
    """The token at which each request fails alone."""
    die_at: int | None = None
    """The token at which the engine dies."""
    facts: EngineFacts = field(default_factory=facts)
    config: EngineConfig = field(default_factory=lambda: EngineConfig(model="fake"))
    submitted: list[Submitted] = field(default_factory=list)
    rendered: list[dict] = field(default_factory=list)
    """What was given to the chat template."""
    streams: dict[str, FakeStream] = field(default_factory=dict)
    aborted: list[str] = field(default_factory=list)
    dead_error: EngineDeadError | None = None
    is_ready: bool = True
    default_sampling: Mapping[str, object] = field(default_factory=dict)
    tokenizer: object = None
    num_finished: int = 0
    num_output_tokens: int = 0
    pooled: list[tuple] = field(default_factory=list)
    """(prompt, pair, params) of each text that was pooled."""
    heard: list[tuple] = field(default_factory=list)
    """(clip, params) of each transcription."""

    @property
    def errored(self) -> bool:
        return self.dead_error is not None

    @property
    def num_unfinished(self) -> int:
        return len(self.streams)

    @property
    def core_pid(self) -> int:
        return os.getpid()

    async def submit(
        self,
        prompt,
        params,
        request_id,
        *,
        output_kind="delta",
        priority=None,
        add_special_tokens=True,
    ):
        if self.dead_error is not None:
            raise self.dead_error
        if self.queue_limit is not None and len(self.streams) >= self.queue_limit:
            raise QueueFullError(f"{len(self.streams)} requests wait; try again later")
        ids = self._prompt_ids(prompt, params, add_special_tokens)
        assert request_id not in self.streams
        self.submitted.append(
            Submitted(prompt, params, request_id, output_kind, add_special_tokens)
        )
        stream = FakeStream(
            self, prompt if isinstance(prompt, str) else None, ids, params, request_id, output_kind
        )
        self.streams[request_id] = stream
        return stream

    async def generate(self, prompt, params, request_id, **options):
        stream = await self.submit(prompt, params, request_id, **options)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.abort()

    async def reset_prefix_cache(self):
        return True

    def _prompt_ids(self, prompt, params, add_special_tokens) -> list[int]:
        ids = list(prompt) if not isinstance(prompt, str) else _encode(prompt, add_special_tokens)
        ids = ids[-params.truncate_prompt_tokens :] if params.truncate_prompt_tokens else ids
        if not ids:
            raise RequestError("the prompt is empty", param="prompt")
        if len(ids) >= self.facts.max_model_len:
            raise RequestError(f"the prompt has {len(ids)} tokens", param="prompt")
        for token_id in (*ids, *(params.logit_bias or ()), *(params.allowed_token_ids or ())):
            if not 0 <= token_id < VOCAB_SIZE:
                raise RequestError(f"token {token_id} is out of the vocabulary", param="prompt")
        if params.logits_processors:
            raise RequestError("no such processor", param="logits_processors")
        return ids

    async def pool(self, prompt, params, request_id, *, pair=None, add_special_tokens=True):
        if self.dead_error is not None:
            raise self.dead_error
        check_task(params.task, self.facts.tasks, self.facts.served_model_name)
        ids = list(prompt) if not isinstance(prompt, str) else _encode(prompt, add_special_tokens)
        ids = ids[-params.truncate_prompt_tokens :] if params.truncate_prompt_tokens else ids
        if not ids or max(ids) >= VOCAB_SIZE or len(ids) > self.facts.max_model_len:
            raise RequestError("the prompt does not fit", param="input")
        if params.dimensions is not None and params.dimensions > NUM_DIMENSIONS:
            raise RequestError("the vector is shorter", param="dimensions")
        self.pooled.append((prompt, pair, params))
        await asyncio.sleep(0)
        return PoolingOutput(data=_pooled(params, ids, pair), num_prompt_tokens=len(ids))

    async def transcribe(self, clip, params, request_id):
        check_task("transcribe", self.facts.tasks, self.facts.served_model_name)
        self.heard.append((clip, params))
        for index, word in enumerate(TRANSCRIPT):
            await asyncio.sleep(0)
            yield TranscriptSegment(
                start_s=index,
                end_s=index + 0.5,
                text=f" {word}",
                token_ids=[index],
                language="en",
                average_logprob=-0.25,
                words=[TranscriptWord(word=word, start_s=index, end_s=index + 0.5)],
            )

    async def render_chat(
        self,
        messages,
        *,
        tools=None,
        chat_template=None,
        add_generation_prompt=True,
        continue_final_message=False,
        template_variables: Mapping[str, object] | None = None,
    ):
        self.rendered.append({"messages": list(messages), "tools": tools})
        if chat_template == "broken":
            raise RequestError("the chat template is broken", param="chat_template")
        ends = ["\n"] * (len(messages) - 1) + ["" if continue_final_message else "\n"]
        text = "".join(
            f"<{m['role']}>{m['content']}{end}" for m, end in zip(messages, ends, strict=True)
        )
        variables = "".join(f"[{k}={v}]" for k, v in (template_variables or {}).items())
        return (
            (chat_template or "")
            + variables
            + text
            + ("<assistant>" if add_generation_prompt else "")
        )

    async def encode(self, text, *, add_special_tokens=True):
        return _encode(text, add_special_tokens)

    async def decode(self, token_ids, *, skip_special_tokens=False):
        if any(not 0 <= token_id < VOCAB_SIZE for token_id in token_ids):
            raise RequestError("a token is out of the vocabulary", param="tokens")
        return decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def abort(self, request_id):
        if request_id in self.streams:
            await self.streams[request_id].abort()

    async def statistics(self):
        if self.dead_error is not None:
            raise self.dead_error
        return EngineStatistics(
            num_running=len(self.streams),
            num_waiting=2,
            cache_usage=0.25,
            num_prompt_tokens=100,
            num_cached_prompt_tokens=40,
            num_output_tokens=self.num_output_tokens,
            num_preemptions=3,
            memory_bytes={"weights": 4},
        )

    async def shutdown(self, drain_timeout_s=0.0):
        self.is_ready = False
        for stream in list(self.streams.values()):
            await stream.abort()


class FakeStream:
    """The outputs of one request: all children advance by a token in turn."""

    def __init__(self, engine, prompt, prompt_ids, params, request_id, kind) -> None:
        self.engine, self.request_id = engine, request_id
        self._prompt, self._prompt_ids, self._params, self._kind = prompt, prompt_ids, params, kind
        now_s = time.monotonic()
        self._metrics = RequestMetrics(arrival_time_s=now_s, first_scheduled_time_s=now_s)
        self._waiting: deque[RequestOutput] = deque()
        self._children = [_Child(self, index) for index in range(params.n)]
        self._num_steps = 0
        self._is_over = False
        self._has_told_prompt = False
        self._is_aborted = asyncio.Event()

    def __aiter__(self):
        return self

    async def __anext__(self) -> RequestOutput:
        if self._kind == "final":
            return await self._final()
        while not self._waiting:
            await self._step()
        return self._waiting.popleft()

    async def abort(self) -> None:
        if not self._is_over and not all(child.reason for child in self._children):
            self.engine.aborted.append(self.request_id)
            for child in self._children:
                child.reason = child.reason or "abort"
            self._waiting.append(self._output([child.delta() for child in self._children]))
        self._end()
        self._is_aborted.set()

    async def _final(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        while not all(child.reason for child in self._children):
            await self._step()
        self._waiting.clear()
        self._end()
        return self._output([child.whole() for child in self._children])

    async def _step(self) -> None:
        if self._is_over:
            raise StopAsyncIteration
        if self.engine.hold is not None and self._num_steps >= self.engine.hold_after:
            await self._wait_hold()
            if self._waiting or self._is_over:
                return
        await asyncio.sleep(0)
        if self.engine.dead_error is not None:
            raise self.engine.dead_error
        if self._num_steps == self.engine.die_at:
            self.engine.dead_error = EngineDeadError(
                "the engine died", root_cause="a test wanted it"
            )
            raise self.engine.dead_error
        changed = [child for child in self._children if child.reason is None]
        for child in changed:
            child.advance(fails=self._num_steps == self.engine.fail_at)
        self._num_steps += 1
        self._metrics.last_token_time_s = time.monotonic()
        self._metrics.first_token_time_s = self._metrics.first_token_time_s or time.monotonic()
        if self._kind == "delta":
            # One output each, as the engine's own updates come.
            self._waiting.extend(self._output([child.delta()]) for child in changed)
        if all(child.reason for child in self._children):
            self._end(is_done=self._kind == "delta")

    async def _wait_hold(self) -> None:
        waits = [asyncio.ensure_future(e.wait()) for e in (self.engine.hold, self._is_aborted)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _end(self, *, is_done: bool = True) -> None:
        self._is_over = self._is_over or is_done
        if self.engine.streams.pop(self.request_id, None) is not None:
            self.engine.num_finished += 1

    def _output(self, outputs) -> RequestOutput:
        is_first, self._has_told_prompt = not self._has_told_prompt, True
        tells = self._params.prompt_logprobs is not None and is_first
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_ids,
            outputs=outputs,
            is_finished=all(child.reason for child in self._children),
            prompt_logprobs=self._prompt_logprobs() if tells else None,
            num_cached_tokens=len(self._prompt_ids) // 2,
            metrics=self._metrics,
            error="logits are NaN" if any(c.reason == "error" for c in self._children) else None,
        )

    def _prompt_logprobs(self):
        ids, count = self._prompt_ids, self._params.prompt_logprobs
        return [None, *(logprobs_of(token_id, count) for token_id in ids[1:])]


class _Child:
    def __init__(self, stream: FakeStream, index: int) -> None:
        self._stream, self.index = stream, index
        self._params = stream._params
        self._planned = [*stream.engine.reply(stream._prompt_ids, index).encode(), EOS_ID]
        if self._params.ignore_eos:
            self._planned = self._planned[:-1] * 1000
        self.token_ids: list[int] = []
        self._num_shown = 0
        self._shown_text = ""
        self.reason: str | None = None
        self.stop_reason = None

    def advance(self, *, fails: bool) -> None:
        token_id = self._planned[len(self.token_ids)]
        self.token_ids.append(token_id)
        self._stream.engine.num_output_tokens += 1
        text = decode(self.token_ids)
        if fails:
            self.reason = "error"
        elif token_id == EOS_ID:
            self.reason = "stop"
        elif found := [s for s in self._params.stop_strings if s in text]:
            self.reason, self.stop_reason = "stop", found[0]
        elif token_id in (self._params.stop_token_ids or ()):
            self.reason, self.stop_reason = "stop", token_id
        elif len(self.token_ids) == self._limit():
            self.reason = "length"

    def _limit(self) -> int:
        room = self._stream.engine.facts.max_model_len - len(self._stream._prompt_ids)
        return min(self._params.max_tokens or room, room)

    def _text(self) -> str:
        text = decode(self.token_ids)
        if isinstance(self.stop_reason, str) and not self._params.include_stop_str_in_output:
            return text[: text.index(self.stop_reason)]
        held = max((len(s) - 1 for s in self._params.stop_strings), default=0)
        return text if self.reason else text[: max(len(text) - held, 0)].rstrip("\ufffd")

    def delta(self) -> CompletionOutput:
        text, ids = self._text(), self.token_ids[self._num_shown :]
        new, self._shown_text = text[len(self._shown_text) :], text
        self._num_shown = len(self.token_ids)
        return self._output(new, ids)

    def whole(self) -> CompletionOutput:
        return self._output(self._text(), list(self.token_ids))

    def _output(self, text, ids) -> CompletionOutput:
        count = self._params.logprobs
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=ids,
            logprobs=None if count is None else [logprobs_of(i, count) for i in ids],
            finish_reason=self.reason,
            stop_reason=self.stop_reason,
        )


def vector_of(ids: Sequence[int]) -> list[float]:
    """How often each of the low three bits' values occurs: texts alike have vectors alike."""
    return [float(sum(token_id % 8 == value for token_id in ids)) for value in range(8)]


def _pooled(params, ids, pair):
    if params.task == "embed":
        return vector_of(ids)[: params.dimensions]
    if params.task == "classify":
        return [0.25, 0.75] if params.use_activation else [-1.0, 1.0]
    if params.task == "score":
        return [float(len(set(pair.encode()) & set(ids)))]
    if params.task == "reward":
        return [float(len(ids))]
    return [[float(token_id)] for token_id in ids]


def logprobs_of(token_id: int, count: int) -> dict[int, Logprob]:
    """The token is the second most likely; the next ids of the vocabulary stand around it."""
    ranked = [(token_id + 1) % VOCAB_SIZE, token_id, (token_id + 2) % VOCAB_SIZE][: max(count, 0)]
    entries = {
        other: Logprob(
            -0.5 * (rank + 1) if other != 65 else float("-inf"), rank + 1, decode([other])
        )
        for rank, other in enumerate(ranked)
    }
    return {token_id: Logprob(-1.0, 2, decode([token_id])), **entries}


def decode(token_ids, *, skip_special_tokens: bool = True) -> str:
    text, run = "", bytearray()
    for token_id in token_ids:
        if token_id < 256:
            run.append(token_id)
        elif not skip_special_tokens:
            text += run.decode(errors="replace") + f"<{token_id}>"
            run.clear()
    return text + run.decode(errors="replace")


def _encode(text: str, add_special_tokens: bool) -> list[int]:
    return [BOS_ID] * add_special_tokens + list(text.encode())
