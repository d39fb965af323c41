"""`/v1/responses`: its request, which becomes one of chat, and its response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.serving.protocol.base import Count, RequestBody, ResponseBody, TokenId

_PASSED = (
    *("model", "temperature", "top_p", "parallel_tool_calls", "seed", "stop", "cache_salt"),
    *("presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty"),
    *("ignore_eos", "min_tokens", "stop_token_ids", "priority", "chat_template_kwargs"),
)
"""Fields that chat knows under the same name."""
CHAT_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text",
    "verbosity": "text",
    "reasoning_effort": "reasoning",
    "logprobs": "top_logprobs",
    "prompt": "input",
}
"""Chat's fields to those of this endpoint of which they are made, for errors."""
Include = Literal["message.output_text.logprobs"]


class TextOptions(RequestBody):
    """What the text of the answer looks like."""

    format: dict[str, Any] | None = None
    """`text`, `json_object` or `json_schema`."""
    verbosity: str | None = None


class ReasoningOptions(RequestBody):
    """How much the model thinks before it answers."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "summary": (),
        "generate_summary": (),
        "context": ("auto",),
        "mode": (),
    }

    effort: str | None = None


class ResponseStreamOptions(RequestBody):
    """What a stream tells besides its events."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}


class ResponsesRequest(RequestBody):
    """A turn of a conversation, whose earlier turns the server may hold."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "max_tool_calls": (),
        "moderation": (),
        "prompt": (),
        "prompt_cache_options": (),
        "service_tier": ("auto", "default"),
        "truncation": ("disabled",),
    }
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {"safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    """For this turn alone: it is not carried over to the next."""
    previous_response_id: str | None = None
    max_output_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Count | None = None
    include: list[Include] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    """None: yes."""
    background: bool | None = None
    """Answer at once, and be asked for the rest by id."""
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    user: str | None = None

    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    stop_token_ids: list[TokenId] | None = None
    priority: Count | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the response can be asked for later."""
        return self.store is not False

    @property
    def tells_logprobs(self) -> bool:
        """Whether log-probabilities stand beside the text."""
        return bool(self.include) or self.top_logprobs is not None

    def check(self) -> None:
        """Raises: RequestError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options is given without stream=true; leave it out or stream",
                param="stream_options",
            )
        if self.background and self.stream:
            raise RequestError(
                "background with stream is not supported; choose one", param="background"
            )
        if self.background and not self.is_stored:
            raise RequestError("background needs store=true: the answer is stored", param="store")

    def chat_fields(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The request of chat that answers `messages` as this one asks, always streamed."""
        fields: dict[str, Any] = {
            name: value for name in _PASSED if (value := getattr(self, name)) is not None
        }
        fields |= {"messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        if self.max_output_tokens is not None:
            fields["max_completion_tokens"] = self.max_output_tokens
        if self.tells_logprobs:
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _response_format(self.text.format)
        if self.text is not None and self.text.verbosity is not None:
            fields["verbosity"] = self.text.verbosity
        if self.reasoning is not None and self.reasoning.effort is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        if self.tools:
            fields["tools"] = [_chat_tool(tool) for tool in self.tools]
        if self.tool_choice is not None and (self.tools or self.tool_choice != "auto"):
            fields["tool_choice"] = _chat_tool_choice(self.tool_choice)
        return fields


class OutputText(ResponseBody):
    """Text that the model wrote."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any]
    logprobs: list[dict[str, Any]]


class ReasoningText(ResponseBody):
    """What the model thought."""

    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputMessage(ResponseBody):
    """The assistant's turn."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class ReasoningItem(ResponseBody):
    """What came before the turn, and is not part of it."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[Any]
    content: list[ReasoningText]


class FunctionCallItem(ResponseBody):
    """A tool that the model wants called."""

    id: str
    type: Literal["function_call"] = "function_call"
    status: Literal["in_progress", "completed", "incomplete"]
    call_id: str
    name: str
    arguments: str
    """JSON."""


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class InputTokensDetails(ResponseBody):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """None are told apart: what a prompt leaves in the cache costs nothing."""


class OutputTokensDetails(ResponseBody):
    """What the output's tokens were spent on."""

    reasoning_tokens: int


class ResponseUsage(ResponseBody):
    """Tokens of one response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseFailure(ResponseBody):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(ResponseBody):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponseObject(ResponseBody):
    """A response, in the state in which it is."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None
    status: ResponseStatus
    background: bool
    error: ResponseFailure | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any] | None
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None

    def to_json(self) -> bytes:
        """The body as UTF-8 JSON, with the fields that are null."""
        return self.model_dump_json().encode()


class DeletedResponse(ResponseBody):
    """A response that was forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItemList(ResponseBody):
    """What a response answered."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: Literal[False]


def _response_format(given: dict[str, Any]) -> dict[str, Any]:
    """Chat puts the schema one level deeper."""
    if given.get("type") != "json_schema":
        return given
    inner = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"a tool of type {str(tool.get('type'))[:40]!r} is not supported; this server takes "
            "functions",
            param="tools",
        )
    inner = {name: value for name, value in tool.items() if name != "type"}
    return {"type": "function", "function": inner}


def _chat_tool_choice(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(choice, str) or choice.get("type") != "function":
        return choice
    return {"type": "function", "function": {"name": choice.get("name")}}
