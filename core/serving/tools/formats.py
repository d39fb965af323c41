"""How the families of models write tool calls between marks.

Source: the chat templates that the models are published with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quire.core.serving.tools.events import ToolCall, as_json, read_call, read_json
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
        head = re.match(
            r"(?:\[TOOL_CALLS\])?\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?(?:\[ARGS\])?\s*", rest
        )
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


def qwen_coder_reader(tools: Tools) -> Callable[[str], list[ToolCall] | None]:
    """`<function=name> <parameter=key> value </parameter> ... </function>`."""

    def read(body: str) -> list[ToolCall] | None:
        found = re.fullmatch(r"\s*<function=([^>\n]+)>(.*)</function>\s*", body, re.DOTALL)
        if found is None:
            return None
        name, inner = found.group(1).strip(), found.group(2)
        pairs = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", inner, re.DOTALL)
        rest = re.sub(r"<parameter=[^>\n]+>.*?</parameter>", "", inner, flags=re.DOTALL)
        if rest.strip() or not name:
            return None
        return [_typed_call(name, pairs, tools)]

    return read


def glm_reader(tools: Tools) -> Callable[[str], list[ToolCall] | None]:
    """`name <arg_key>key</arg_key> <arg_value>value</arg_value> ...`."""
    pair = r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"

    def read(body: str) -> list[ToolCall] | None:
        name, _, inner = body.partition("<arg_key>")
        inner = f"<arg_key>{inner}" if inner else ""
        if (
            not re.fullmatch(r"[\w.-]+", name.strip())
            or re.sub(pair, "", inner, flags=re.DOTALL).strip()
        ):
            return None
        return [_typed_call(name.strip(), re.findall(pair, inner, re.DOTALL), tools)]

    return read


def _typed_call(name: str, pairs: Sequence[tuple[str, str]], tools: Tools) -> ToolCall:
    """Values written as plain text: strings where the tool's schema says so, else JSON."""
    properties = properties_of(name, tools)
    arguments = {}
    for key, text in pairs:
        kind = properties.get(key.strip(), {})
        is_text = isinstance(kind, Mapping) and kind.get("type") == "string"
        value = None if is_text else read_json(text.strip())
        is_null = text.strip() == "null" and not is_text
        arguments[key.strip()] = text if value is None and not is_null else value
    return ToolCall(name, as_json(arguments))


def properties_of(name: str, tools: Tools) -> Mapping[str, Any]:
    """The parameters of the tool of that name."""
    for tool in tools:
        function = tool.get("function", {})
        if function.get("name") == name:
            found = (function.get("parameters") or {}).get("properties")
            return found if isinstance(found, Mapping) else {}
    return {}


_GEMMA_VALUE = re.compile(
    r"\s*([\w.-]+)\s*:\s*(?:<escape>(.*?)<escape>|([^,{}]*))\s*(?:,|$)", re.DOTALL
)


def read_gemma_call(body: str) -> list[ToolCall] | None:
    """`call:name{key:<escape>text<escape>,other:3}`."""
    found = re.fullmatch(r"\s*call:([\w.-]+)\{(.*)\}\s*", body, re.DOTALL)
    if found is None:
        return None
    arguments: dict[str, Any] = {}
    inner, position = found.group(2), 0
    while position < len(inner):
        pair = _GEMMA_VALUE.match(inner, position)
        if pair is None or pair.end() == position:
            return None
        plain = pair.group(3)
        value = pair.group(2) if plain is None else read_json(plain.strip())
        arguments[pair.group(1)] = plain.strip() if value is None and plain is not None else value
        position = pair.end()
    return [ToolCall(found.group(1), as_json(arguments))]


def read_gemma_code(body: str) -> list[ToolCall] | None:
    """A block of Python whose lines are calls."""
    lines = [line for line in body.strip().splitlines() if line.strip()]
    return read_python_calls(f"[{', '.join(lines)}]") if lines else None
