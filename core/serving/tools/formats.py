"""How the families of models write tool calls between marks.

Source: the chat templates that the models are published with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.core.serving.tools.events import ToolCall, as_json, read_call, read_json
from quire.core.serving.tools.plain_arguments import (
    GLM,
    QWEN_CODER,
    GemmaArguments,
    TaggedArguments,
)
from quire.core.serving.tools.python_calls import read_python_calls

_DECODER = json.JSONDecoder()
_MISTRAL_HEAD = re.compile(r"(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*")

Tools = Sequence[Mapping[str, Any]]


def read_json_call(body: str) -> list[ToolCall] | None:
    """Hermes, Qwen: `{"name": ..., "arguments": {...}}`."""
    call = read_call(read_json(body))
    return None if call is None else [call]


def read_mistral(body: str) -> list[ToolCall] | None:
    """A list of calls; or each as `name{...}`, `name[ARGS]{...}`, one behind the other."""
    whole = read_json(body.strip())
    if isinstance(whole, list):
        calls = [read_call(item) for item in whole]
        return [call for call in calls if call is not None] if all(calls) else None
    return _read_named_objects(body)


def _read_named_objects(body: str) -> list[ToolCall] | None:
    calls: list[ToolCall] = []
    rest = body.strip()
    while rest:
        head = _MISTRAL_HEAD.match(rest)
        if head is None:
            return None
        try:
            arguments, end = _DECODER.raw_decode(rest, head.end())
        except (ValueError, RecursionError):
            return None
        if not isinstance(arguments, dict):
            return None
        calls.append(ToolCall(head.group(1), as_json(arguments)))
        rest = rest[end:].strip()
    return calls or None


def read_deepseek(body: str) -> list[ToolCall] | None:
    """V3 and R1: `function<sep>name`, then a block of JSON; V3.1: `name<sep>{...}`."""
    before, separator, after = body.partition("<｜tool▁sep｜>")
    if not separator:
        return None
    block = re.fullmatch(r"\s*([^\n`{]+?)\s*```(?:json)?\s*(.*?)\s*```\s*", after, re.DOTALL)
    name, text = (block.group(1), block.group(2)) if block else (before.strip(), after)
    arguments = read_json(text)
    if not name or not isinstance(arguments, dict):
        return None
    return [ToolCall(name, as_json(arguments))]


def read_kimi(body: str) -> list[ToolCall] | None:
    """`functions.name:0<|tool_call_argument_begin|>{...}`; what stands before is the call's id."""
    head, separator, text = body.partition("<|tool_call_argument_begin|>")
    found = re.fullmatch(r"(?:functions\.)?([\w.-]+?)(?::\d+)?", head.strip())
    arguments = read_json(text)
    if not separator or found is None or not isinstance(arguments, dict):
        return None
    return [ToolCall(found.group(1), as_json(arguments), id=head.strip())]


def qwen_coder_arguments(tools: Tools) -> Callable[[str], TaggedArguments]:
    """For `<parameter=key> value </parameter> ... </function>`."""
    return lambda name: TaggedArguments(QWEN_CODER, properties_of(name, tools))


def glm_arguments(tools: Tools) -> Callable[[str], TaggedArguments]:
    """For `<arg_key>key</arg_key> <arg_value>value</arg_value> ... </tool_call>`."""
    return lambda name: TaggedArguments(GLM, properties_of(name, tools))


def plain_reader(
    head: re.Pattern[str],
    make_reader: Callable[[str], TaggedArguments | GemmaArguments],
    end: str = "",
) -> Callable[[str], list[ToolCall] | None]:
    """Reads a whole call of a head and arguments as plain text, which end with `end`."""

    def read(body: str) -> list[ToolCall] | None:
        found = head.match(body)
        if found is None:
            return None
        name = found["name"].strip()
        reader = make_reader(name)
        arguments = read_json(reader.feed(body[found.end() :] + end))
        is_whole = reader.rest is not None and reader.rest.strip() == end
        if not name or reader.is_broken or not is_whole or not isinstance(arguments, dict):
            return None
        return [ToolCall(name, as_json(arguments))]

    return read


def properties_of(name: str, tools: Tools) -> Mapping[str, Any]:
    """The parameters of the tool of that name."""
    for tool in tools:
        function = tool.get("function", {})
        if function.get("name") == name:
            found = (function.get("parameters") or {}).get("properties")
            return found if isinstance(found, Mapping) else {}
    return {}


def read_gemma_code(body: str) -> list[ToolCall] | None:
    """A block of Python whose lines are calls."""
    lines = [line for line in body.strip().splitlines() if line.strip()]
    return read_python_calls(f"[{', '.join(lines)}]") if lines else None
