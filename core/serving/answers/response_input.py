"""The input items of `/v1/responses` as the messages of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from quire.core.engine.chat_images import is_image_part
from quire.core.errors import RequestError

Message = dict[str, Any]
"""As `/v1/chat/completions` takes it."""

_MESSAGE_FIELDS = frozenset({"type", "role", "content", "id", "status", "phase"})
_CALL_FIELDS = {"type", "call_id", "id", "status"}
_ITEM_FIELDS = {
    "function_call": frozenset({*_CALL_FIELDS, "name", "arguments"}),
    "function_call_output": frozenset({*_CALL_FIELDS, "output"}),
}
_PART_FIELDS = frozenset({"type", "text", "annotations", "logprobs"})
"""An answer's text comes back with its annotations, which are none, and log-probabilities."""
_TEXT_PARTS = ("input_text", "output_text", "text")


def items_of(given: str | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input as items. Raises: RequestError for an empty list."""
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not given:
        raise RequestError("input is an empty list; give a text or items", param="input")
    return list(given)


def messages_of(items: Sequence[dict[str, Any]]) -> list[Message]:
    """The messages that the items say.

    What a model thought in earlier turns (`reasoning`) is left out, as chat templates leave it
    out. Raises: RequestError for an item or a part that is not known.
    """
    messages: list[Message] = []
    for item in items:
        kind = item.get("type", "message")
        _refuse_odd(item, _ITEM_FIELDS.get(kind) if isinstance(kind, str) else None)
        if kind == "message":
            messages.append(_message(item))
        elif kind == "function_call":
            _add_call(messages, item)
        elif kind == "function_call_output":
            messages.append(_call_output(item))
        elif kind != "reasoning":
            raise RequestError(
                f"an input item of type {str(kind)[:40]!r} is not supported; this server takes "
                "message, function_call, function_call_output and reasoning",
                param="input",
            )
    return messages


def _message(item: dict[str, Any]) -> Message:
    odd = sorted(map(str, set(item) - _MESSAGE_FIELDS))
    if odd:
        raise RequestError(f"an input message has the field {odd[0][:40]!r}", param="input")
    if "role" not in item or "content" not in item:
        raise RequestError("an input message needs role and content", param="input")
    return {"role": item["role"], "content": _content(item["content"])}


def _content(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [_part(part) for part in content]


def _part(part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if is_image_part(part):
        return dict(part)
    if kind not in _TEXT_PARTS:
        raise RequestError(
            f"a content part of type {str(kind)[:40]!r} is not supported; this server takes "
            "input_text, output_text and input_image",
            param="input",
        )
    _refuse_odd(part, _PART_FIELDS)
    return {"type": "text", "text": part.get("text")}


def _refuse_odd(given: dict[str, Any], known: frozenset[str] | None) -> None:
    """Raises: RequestError for a field that would otherwise be ignored. `known` None: any goes."""
    odd = sorted(str(name) for name, value in given.items() if value is not None)
    for name in odd if known is not None else ():
        if name not in (known or ()):
            raise RequestError(
                f"input of type {str(given.get('type'))[:40]!r} with {name[:40]!r} is not "
                "supported; leave it out",
                param="input",
            )


def _add_call(messages: list[Message], item: dict[str, Any]) -> None:
    """Calls that follow each other, or the turn that they belong to, are one message."""
    call = {
        "id": item.get("call_id"),
        "type": "function",
        "function": {"name": item.get("name"), "arguments": item.get("arguments")},
    }
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
        return
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})


def _call_output(item: dict[str, Any]) -> Message:
    return {
        "role": "tool",
        "tool_call_id": item.get("call_id"),
        "content": _content(item.get("output")),
    }
