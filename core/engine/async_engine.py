"""The asyncio front: many callers, one engine core in its own process.

    engine = await AsyncEngine.start(EngineConfig(model="demo"))
    async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=32), "request-1"):
        print(output.outputs[0].text, end="")
    await engine.shutdown()
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from quire.core.config import EngineConfig
from quire.core.engine.facts import EngineFacts, EngineStatistics
from quire.core.errors import EngineDeadError, RequestError
from quire.core.outputs import RequestOutput
from quire.core.sampling_params import SamplingParams

OutputKind = Literal["delta", "cumulative", "final"]
"""`delta`: what came since the last output; `cumulative`: all so far; `final`: one output at the end."""

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""


class QueueFullError(RequestError):
    """As many requests wait as `max_num_queued` allows; try again later."""


class RequestStream:
    """The outputs of one submitted request; iterate once. A consumer that stops early must call `abort` (or `aclose`).

    A slow consumer finds its deltas merged into one output, so that memory is bounded by the output itself.
    """

    request_id: str

    def __aiter__(self) -> RequestStream:
        raise NotImplementedError

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises: EngineDeadError."""
        raise NotImplementedError

    async def abort(self) -> None:
        """Ends the request in the core too. Harmless after the end."""


class AsyncEngine:
    """Feeds an engine core and hands each caller his own outputs. Used from one event loop.

    Attributes that are fixed after `start`: `config` (resolved), `facts`, `tokenizer` (None where the model has none).
    """

    config: EngineConfig
    facts: EngineFacts
    tokenizer: Any

    @classmethod
    async def start(cls, config: EngineConfig) -> AsyncEngine:
        """Starts the core's process and returns when it can serve.

        Raises: ConfigError, UnsupportedError, PluginError, CheckpointError, DeviceError as the core met them;
        EngineDeadError for anything else, with the root cause.
        """
        raise NotImplementedError

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
        """Validates, tokenizes (off the event loop where the text is long) and hands the request to the core.

        With `params.n > 1` outputs carry their `index`. `priority` overrides that of `params`.
        Raises: RequestError (bad request, or an id in flight), QueueFullError, EngineDeadError.
        """
        raise NotImplementedError

    def generate(
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
        raise NotImplementedError

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

        `chat_template` replaces the model's for this call. Raises: RequestError for messages or a template that
        fail, and for one that takes too long or writes too much.
        """
        raise NotImplementedError

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises: RequestError if the model has no tokenizer."""
        raise NotImplementedError

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids. Raises: RequestError for ids out of the vocabulary or without a tokenizer."""
        raise NotImplementedError

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last output with finish_reason `abort`. Unknown ids are ignored."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted: started, alive, not shutting down."""
        raise NotImplementedError

    @property
    def errored(self) -> bool:
        """Whether the core is dead."""
        raise NotImplementedError

    @property
    def dead_error(self) -> EngineDeadError | None:
        """Why the core is dead."""
        raise NotImplementedError

    @property
    def num_unfinished(self) -> int:
        """Requests in flight."""
        raise NotImplementedError

    async def statistics(self) -> EngineStatistics:
        """Numbers of this moment. Raises: EngineDeadError."""
        raise NotImplementedError

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes; False if running requests still hold blocks. Raises: EngineDeadError."""
        raise NotImplementedError

    async def shutdown(self, drain_timeout_s: float = 0.0) -> None:
        """Refuses new requests, waits so long for those in flight, aborts the rest and ends the core's process."""
