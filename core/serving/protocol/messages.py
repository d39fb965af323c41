"""Anthropic's `/v1/messages`: its request, which becomes one of chat, and its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from quire.core.errors import RequestError
from quire.core.serving.protocol.base import Count, RequestBody, ResponseBody

CHAT_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config",
    "reasoning_effort": "thinking",
    "thinking_token_budget": "thinking",
    "chat_template_kwargs": "thinking",
    "parallel_tool_calls": "tool_choice",
    "prompt": "messages",
}
"""Chat's fields to those of this endpoint of which they are made, for errors."""
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_TOOL_FIELDS = frozenset({"type", "name", "description", "input_schema", "cache_control", "strict"})
_BLOCK_FIELDS = {
    "text": {"type", "text", "cache_control"},
    "tool_use": {"type", "id", "name", "input", "cache_control"},
    "tool_result": {"type", "tool_use_id", "content", "is_error", "cache_control"},
}
_NEUTRAL_IN_BLOCKS: Mapping[str, tuple[Any, ...]] = {
    "citations": (None, []),
    "caller": (None, {"type": "direct"}),
}
_CHOICE_FIELDS = frozenset({"type", "name", "disable_parallel_tool_use"})
_DISPLAYS = ("summarized", "omitted")
_THINKING_FIELDS = frozenset({"type", "budget_tokens", "display"})


class AnthropicMessage(RequestBody):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


class MessagesFields(RequestBody):
    """What a conversation is, for answering and for counting."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {"speed": ("standard",)}
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "user_profile_id", "workspace_id"}
    )

    model: str
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    """`{"type": "enabled"}` and `disabled` become the template's `enable_thinking`; with
    `budget_tokens` thoughts that become longer are ended.
    """
    output_config: dict[str, Any] | None = None
    """`format`: a JSON schema; `effort`."""

    def chat_fields(self) -> dict[str, Any]:
        """The request of chat that says the same. Raises: RequestError for what has no form."""
        messages: list[dict[str, Any]] = []
        if self.system:
            text = _text_of(self.system, "system")
            messages.append({"role": "system", "content": text})
        for message in self.messages:
            messages += _chat_messages(message)
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            fields["tools"] = [_chat_tool(tool) for tool in self.tools]
        if self.tool_choice is not None and (self.tools or self.tool_choice.get("type") != "auto"):
            fields |= _chat_tool_choice(self.tool_choice)
        if self.thinking is not None:
            fields["chat_template_kwargs"] = {"enable_thinking": _is_thinking(self.thinking)}
            fields["thinking_token_budget"] = self.thinking.get("budget_tokens")
            # Of the two ways to show thoughts, the server has them whole or not at all.
            if isinstance(self, MessagesRequest) and self.thinking.get("display") == "omitted":
                fields["include_reasoning"] = False
        for name, value in (self.output_config or {}).items():
            fields |= _chat_output(name, value)
        return fields


class MessagesRequest(MessagesFields):
    """A conversation to answer."""

    neutral_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **MessagesFields.neutral_values,
        "container": (),
        "context_management": (),
        "diagnostics": (),
        "inference_geo": (),
        "mcp_servers": ([],),
        "service_tier": ("auto", "standard_only"),
    }
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {"cache_control", "user_profile_id", "workspace_id", "metadata"}
    )

    max_tokens: Count
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: Count | None = None
    top_p: float | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The request of chat that answers this one, always streamed."""
        fields = super().chat_fields()
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
        fields["max_completion_tokens"] = self.max_tokens
        if self.stop_sequences:
            fields["stop"] = self.stop_sequences
        for name in ("temperature", "top_k", "top_p"):
            if getattr(self, name) is not None:
                fields[name] = getattr(self, name)
        return fields


class MessagesUsage(ResponseBody):
    """Tokens of one answer. Those that the prefix cache held are not among `input_tokens`."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessagesAnswer(ResponseBody):
    """The assistant's turn."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    """Blocks: `text`, `thinking`, `tool_use`."""
    stop_reason: str | None
    """`end_turn`, `max_tokens`, `stop_sequence` or `tool_use`."""
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(ResponseBody):
    """How long a conversation is."""

    input_tokens: int


class AnthropicErrorDetail(ResponseBody):
    """What was wrong."""

    type: str
    message: str


class AnthropicError(ResponseBody):
    """As the Anthropic API reports errors."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None


def _chat_messages(message: AnthropicMessage) -> list[dict[str, Any]]:
    """A turn as chat has it: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results, texts, calls = [], [], []
    for block in message.content:
        kind = block.get("type")
        _refuse_odd(block, "messages")
        if kind == "text":
            texts.append({"type": "text", "text": block.get("text")})
        elif kind == "tool_use":
            calls.append(_chat_call(block))
        elif kind == "tool_result":
            results.append(_chat_result(block))
        elif kind not in ("thinking", "redacted_thinking"):
            raise RequestError(
                f"a content block of type {str(kind)[:40]!r} is not supported; this server takes "
                "text, tool_use, tool_result and thinking",
                param="messages",
            )
    own: dict[str, Any] = {"role": message.role, "content": texts or ""}
    if calls:
        own["tool_calls"] = calls
    return [*results, own] if texts or calls or not results else results


def _refuse_odd(block: dict[str, Any], param: str) -> None:
    """Raises: RequestError for a field of a block that would otherwise be ignored."""
    kind = block.get("type")
    known = _BLOCK_FIELDS.get(kind) if isinstance(kind, str) else None
    for name, value in block.items():
        if known is None or name in known or value in _NEUTRAL_IN_BLOCKS.get(name, (None,)):
            continue
        raise RequestError(
            f"a block of type {kind} with {str(name)[:40]!r} is not supported; leave it out",
            param=param,
        )


def _chat_call(block: dict[str, Any]) -> dict[str, Any]:
    function = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}))}
    return {"id": block.get("id"), "type": "function", "function": function}


def _chat_result(block: dict[str, Any]) -> dict[str, Any]:
    text = _text_of(block.get("content") or "", "messages")
    if block.get("is_error") is True and not text.lower().startswith("error"):
        text = f"Error: {text}"  # chat templates know no other way to say it
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text}


def _text_of(content: Any, param: str) -> str:
    """A text, or one block of text after the other. A block of another kind is refused."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{param} holds content that is neither text nor blocks", param=param)
    texts = []
    for block in content:
        if not isinstance(block, dict) or block.get("type") != "text":
            raise RequestError(f"{param} holds a block that is not text", param=param)
        _refuse_odd(block, param)
        text = block.get("text")
        if not isinstance(text, str):
            raise RequestError(f"a block of {param} has no text", param=param)
        texts.append(text)
    return "\n".join(texts)


def _chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    odd = sorted(map(str, set(tool) - _TOOL_FIELDS))
    if tool.get("type", "custom") != "custom" or odd:
        asked = odd[0] if odd else f"type {tool.get('type')!r}"
        raise RequestError(
            f"a tool with {asked[:60]} is not supported; this server takes tools of your own "
            "(name, description, input_schema)",
            param="tools",
        )
    function = {"name": tool.get("name"), "parameters": tool.get("input_schema", {})}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _chat_tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    _refuse_unknown(choice, _CHOICE_FIELDS, "tool_choice")
    kind = choice.get("type")
    fields: dict[str, Any] = {}
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    if kind == "tool":
        named = {"type": "function", "function": {"name": choice.get("name")}}
        return {**fields, "tool_choice": named}
    if not isinstance(kind, str) or kind not in _TOOL_CHOICES:
        raise RequestError(
            f"tool_choice has the type {str(kind)[:40]!r}; it is auto, any, tool or none",
            param="tool_choice",
        )
    return {**fields, "tool_choice": _TOOL_CHOICES[kind]}


def _is_thinking(thinking: dict[str, Any]) -> bool:
    kind = thinking.get("type")
    _refuse_unknown(thinking, _THINKING_FIELDS, "thinking")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise RequestError(f"thinking has the type {str(kind)[:40]!r}", param="thinking")
    if kind != "enabled" and thinking.get("budget_tokens") is not None:
        raise RequestError(
            f"thinking.budget_tokens belongs to the type enabled, not {kind}; leave it out",
            param="thinking",
        )
    if thinking.get("display") not in (None, *_DISPLAYS):
        raise RequestError(
            f"thinking.display is {str(thinking['display'])[:40]!r}; it is "
            f"{' or '.join(_DISPLAYS)}",
            param="thinking",
        )
    return bool(kind != "disabled")


def _refuse_unknown(given: dict[str, Any], known: frozenset[str], param: str) -> None:
    odd = sorted(map(str, set(given) - known))
    if odd:
        raise RequestError(f"{param}.{odd[0][:40]} is not supported; leave it out", param=param)


def _chat_output(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if name == "effort":
        return {"reasoning_effort": value}
    if name == "format" and isinstance(value, dict) and value.get("type") == "json_schema":
        schema = {"name": "answer", "schema": value.get("schema"), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    raise RequestError(f"output_config.{name[:40]} is not supported", param="output_config")
