"""The asyncio front: many callers, one engine core in its own process.

engine = await AsyncEngine.start(EngineConfig(model="demo"))
async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=32), "request-1"):
    print(output.outputs[0].text, end="")
await engine.shutdown()
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from quire.core.config import EngineConfig
from quire.core.engine.audio import AudioClip, TranscriptionParams, TranscriptSegment
from quire.core.engine.chat import ChatRenderer
from quire.core.engine.client import AsyncProcessClient
from quire.core.engine.core import BuildCore, EngineCore
from quire.core.engine.facts import EngineFacts, EngineStatistics
from quire.core.engine.feature_readers import AudioReader
from quire.core.engine.features import ModelInput
from quire.core.engine.front import Front, make_front
from quire.core.engine.messages import same_death
from quire.core.engine.output_state import OutputKind
from quire.core.engine.pooling import PoolingOutput, PoolingParams, check_task, refuse_text
from quire.core.engine.pooling_desk import settle
from quire.core.engine.prompts import Prompt, parse_prompt
from quire.core.engine.request_stream import RequestStream
from quire.core.engine.sampling_spec import check_token_ids
from quire.core.engine.tokenizer import start_import
from quire.core.engine.transcription import Transcriber
from quire.core.errors import EngineDeadError, RequestError
from quire.core.outputs import RequestOutput
from quire.core.sampling_params import SamplingParams

__all__ = ["AsyncEngine", "OutputKind", "Prompt", "QueueFullError", "RequestStream"]

_UPDATES_AT_ONCE = 128
"""Updates that are processed before other tasks have a turn."""
_POLL_DRAIN_S = 0.02


class QueueFullError(RequestError):
    """As many requests wait as `max_num_queued` allows; try again later."""


class AsyncEngine:
    """Feeds an engine core and hands each caller his own outputs. Used from one event loop."""

    def __init__(self, client: AsyncProcessClient, front: Front, chat: ChatRenderer | None) -> None:
        """Call `start` instead."""
        self.config: EngineConfig = client.config
        """Resolved."""
        self.facts: EngineFacts = client.facts
        self.tokenizer: Any = front.codec.tokenizer if front.codec else None
        """Of transformers; None where the model has none."""
        self._client = client
        self._front = front
        self._chat = chat
        self._streams: dict[str, RequestStream] = {}
        self._is_closing = False
        self._flusher: asyncio.TimerHandle | None = None
        self._receiver = asyncio.get_running_loop().create_task(
            self._receive(), name="quire-receive-updates"
        )

    @classmethod
    async def start(
        cls, config: EngineConfig, *, build_core: BuildCore = EngineCore.build
    ) -> AsyncEngine:
        """Starts the core's process and returns when it can serve.

        Raises: ConfigError, UnsupportedError, PluginError, CheckpointError, DeviceError as
        the core met them; EngineDeadError for anything else, with the root cause.
        """
        importer = start_import(config.model, config.tokenizer)
        client = await AsyncProcessClient.start(config, build_core=build_core)
        try:
            await asyncio.to_thread(importer.join)
            front = await asyncio.to_thread(
                make_front,
                client.config,
                client.facts,
                stream_interval_s=client.config.stream_interval_s,
            )
            template = client.config.chat_template
            chat = ChatRenderer(front.codec, template) if front.codec else None
            return cls(client, front, chat)
        except BaseException:
            await client.close()
            raise

    # ------------------------------------------------------------------------------ generation

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        output_kind: OutputKind = "delta",
        priority: int | None = None,
        add_special_tokens: bool = True,
    ) -> RequestStream:
        """Validates, tokenizes (long texts off the event loop) and hands the request to the core.

        With `params.n > 1` outputs carry their `index`. `priority` overrides that of `params`.
        Raises: RequestError (bad request, or an id in flight), QueueFullError, EngineDeadError;
        CheckpointError for text where the model has no tokenizer.
        """
        self._refuse_if_not_ready()
        refuse_text(self.facts.tasks, self.facts.served_model_name)
        # Before the text is read, so that a refusal stays cheap; and after it, since that may take.
        self._refuse_if_full(params.n)
        model_input = await self._read(prompt, add_special_tokens=add_special_tokens)
        if params.structured_outputs is not None:
            await asyncio.to_thread(self._front.check_grammar, params)
        self._refuse_if_not_ready()
        prepared = self._front.inputs.prepare(
            request_id, prompt, params, priority=priority, model_input=model_input
        )
        self._refuse_if_full(len(prepared.specs))
        stream = RequestStream(
            request_id, is_delta=output_kind == "delta", abort=self._abort_in_core
        )
        self._front.outputs.add(prepared, output_kind, self._sink(stream))
        self._streams[request_id] = stream
        self._client.add(prepared.specs)
        return stream

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        *,
        output_kind: OutputKind = "delta",
        priority: int | None = None,
        add_special_tokens: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """`submit` and iteration in one; errors of `submit` come with the first item.

        Closing or cancelling the iteration aborts the request.
        """
        stream = await self.submit(
            prompt,
            params,
            request_id,
            output_kind=output_kind,
            priority=priority,
            add_special_tokens=add_special_tokens,
        )
        try:
            async for output in stream:
                yield output
        finally:
            await stream.abort()

    async def abort(self, request_id: str) -> None:
        """Ends a request.

        Its stream gets a last output with finish_reason `abort`. Unknown ids are ignored.
        """
        self._abort_in_core(request_id)

    # ------------------------------------------------------------------------- vectors and sound

    async def pool(
        self,
        prompt: Prompt,
        params: PoolingParams,
        request_id: str,
        *,
        pair: str | None = None,
        add_special_tokens: bool = True,
    ) -> PoolingOutput:
        """One text as a vector, as scores of labels or, with `pair`, as the score of two texts.

        Cancelling it ends the request.
        Raises: RequestError (a task that is none of the model's, a bad prompt), QueueFullError,
        EngineDeadError.
        """
        self._refuse_if_not_ready()
        check_task(params.task, self.facts.tasks, self.facts.served_model_name)
        desk = self._front.pooling
        make = functools.partial(
            desk.prepare, prompt, params, request_id,
            pair=pair, add_special_tokens=add_special_tokens,
        )  # fmt: skip
        spec = await asyncio.to_thread(make) if desk.is_slow(prompt, pair) else make()
        self._refuse_if_not_ready()
        self._refuse_if_full(1)
        future: asyncio.Future[PoolingOutput] = asyncio.get_running_loop().create_future()
        desk.add(spec, functools.partial(settle, future))
        self._client.add([spec])
        try:
            return await future
        finally:
            if desk.forget(request_id) and not self.errored:
                self._client.abort([request_id])

    async def transcribe(
        self, clip: AudioClip, params: TranscriptionParams, request_id: str
    ) -> AsyncIterator[TranscriptSegment]:
        """The text of a clip, segment by segment as it is recognized.

        Closing or cancelling the iteration ends the request.
        Raises: RequestError (a model that hears no audio, an unknown language), QueueFullError,
        EngineDeadError, with the first item.
        """
        self._refuse_if_not_ready()
        check_task("transcribe", self.facts.tasks, self.facts.served_model_name)
        reader = self._front.inputs.reader
        assert isinstance(reader, AudioReader), self.facts
        codec = self._front.inputs.require_codec()
        transcriber = Transcriber(self.generate, reader, codec, self.facts)
        async with contextlib.aclosing(
            transcriber.transcribe(clip, params, request_id)  # type: ignore[type-var]
        ) as segments:
            async for segment in segments:
                yield segment

    # ------------------------------------------------------------------------------------ text

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation; submit it with `add_special_tokens=False`.

        `chat_template` replaces the model's for this call.
        Raises: RequestError for messages or a template that fail, and for one that takes
        too long or writes too much; CheckpointError without a tokenizer.
        """
        self._front.inputs.require_codec()
        assert self._chat is not None, self.facts
        return await asyncio.to_thread(
            self._chat.render,
            messages,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises: CheckpointError if the model has no tokenizer."""
        inputs, parsed = self._front.inputs, parse_prompt(text)
        if inputs.is_slow(parsed):
            return await asyncio.to_thread(
                inputs.tokenize, parsed, add_special_tokens=add_special_tokens
            )
        return inputs.tokenize(parsed, add_special_tokens=add_special_tokens)

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids.

        Raises: RequestError for ids out of the vocabulary; CheckpointError without a
        tokenizer.
        """
        codec = self._front.inputs.require_codec()
        check_token_ids(token_ids, self.facts.vocab_size, "tokens")
        return codec.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    # ----------------------------------------------------------------------------------- state

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted: started, alive, not shutting down."""
        return not self._is_closing and not self.errored

    @property
    def errored(self) -> bool:
        """Whether the core is dead."""
        return self._client.dead_error is not None

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the core is dead."""
        return self._client.dead_error

    @property
    def num_unfinished(self) -> int:
        """Requests in flight."""
        return self._front.outputs.num_unfinished + self._front.pooling.num_unfinished

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        """Sampling fields that the model's authors recommend (`generation_config.json`)."""
        return self._front.inputs.defaults.sampling

    @property
    def core_pid(self) -> int:
        """The process id of the core."""
        return self._client.pid

    async def statistics(self) -> EngineStatistics:
        """Numbers of this moment. Raises: EngineDeadError."""
        return await self._client.statistics()

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes; running requests keep their blocks. Raises: EngineDeadError."""
        return await self._client.reset_prefix_cache()

    async def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        """Refuses new requests, waits so long for those in flight, aborts the rest, ends the core.

        Calling twice is harmless.
        """
        if self._is_closing:
            return
        self._is_closing = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_timeout_s):
                while self.num_unfinished and not self.errored:  # noqa: ASYNC110 - rare and short
                    await asyncio.sleep(_POLL_DRAIN_S)
        for request_id in self._front.outputs.request_ids:
            self._abort_in_core(request_id)
        self._front.pooling.fail_all(
            EngineDeadError("the engine is shutting down; send the request to another")
        )
        self._receiver.cancel()
        if self._flusher is not None:
            self._flusher.cancel()
        await asyncio.gather(self._receiver, return_exceptions=True)
        await self._client.close()
        self._front.grammars.close()
        if self._chat is not None:
            self._chat.close()

    # --------------------------------------------------------------------------------- helpers

    def _refuse_if_not_ready(self) -> None:
        if self.dead_error is not None:
            raise same_death(self.dead_error)
        if self._is_closing:
            raise EngineDeadError("the engine is shutting down; send the request to another")

    def _refuse_if_full(self, num_new: int) -> None:
        limit = self.config.max_num_queued
        if limit is None:
            return
        num_there = self._front.outputs.num_unfinished_outputs
        num_there += self._front.pooling.num_unfinished
        if num_there + num_new > limit + self.config.max_num_seqs:
            raise QueueFullError(
                f"{num_there} requests are in flight; {self.config.max_num_seqs} run at once and "
                f"{limit} may wait; try again later"
            )

    async def _read(self, prompt: Prompt, *, add_special_tokens: bool) -> ModelInput:
        inputs = self._front.inputs
        parsed = parse_prompt(prompt)
        if inputs.is_slow(parsed):
            return await asyncio.to_thread(
                inputs.read, parsed, add_special_tokens=add_special_tokens
            )
        return inputs.read(parsed, add_special_tokens=add_special_tokens)

    def _sink(self, stream: RequestStream) -> Callable[[RequestOutput], None]:
        def put(output: RequestOutput) -> None:
            if output.is_finished:
                self._streams.pop(stream.request_id, None)
            stream.put(output)

        return put

    def _abort_in_core(self, request_id: str) -> None:
        to_abort = self._front.outputs.abort([request_id])
        if to_abort and not self.errored:
            self._client.abort(to_abort)

    async def _receive(self) -> None:
        """Hands out what the core sends until it dies.

        Then everybody who waits gets the same error.
        """
        try:
            while True:
                updates = await self._client.receive()
                for start in range(0, len(updates), _UPDATES_AT_ONCE):
                    if start:
                        await asyncio.sleep(0)
                    some = updates[start : start + _UPDATES_AT_ONCE]
                    self._front.pooling.process(some)
                    to_abort = self._front.outputs.process(some)
                    if to_abort:
                        self._client.abort(to_abort)
                if self._flusher is None:
                    self._flush()
        except EngineDeadError as error:
            self._fail_all(error)
        except Exception as error:  # ours; without this task every stream would wait for ever
            self._fail_all(
                EngineDeadError("the front of the engine failed", root_cause=repr(error))
            )
            raise

    def _flush(self) -> None:
        """Hands over what was held back, and comes again when more of it is due."""
        wait_s = self._front.outputs.flush()
        loop = asyncio.get_running_loop()
        self._flusher = None if wait_s is None else loop.call_later(wait_s, self._flush)

    def _fail_all(self, error: EngineDeadError) -> None:
        self._front.outputs.forget_all()
        self._front.pooling.fail_all(error)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)
