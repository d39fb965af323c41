"""Calls written as Python: `[name(key=1, other="text"), ...]`. Nothing is executed."""

from __future__ import annotations

import ast

from quire.core.serving.tools.events import ToolCall, as_json

_MAX_CHARS = 200_000


def read_python_calls(text: str) -> list[ToolCall] | None:
    """The calls of a list; None for anything else."""
    if len(text) > _MAX_CHARS:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.List) or not tree.elts:
        return None
    calls = [_read(node) for node in tree.elts]
    return [call for call in calls if call is not None] if all(calls) else None


def _read(node: ast.expr) -> ToolCall | None:
    if not isinstance(node, ast.Call) or node.args:
        return None
    name = _dotted(node.func)
    if name is None:
        return None
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            return None
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            return None
    try:
        return ToolCall(name, as_json(arguments))
    except (TypeError, ValueError, RecursionError):  # sets, bytes: Python has them and JSON has not
        return None


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value)
        return None if owner is None else f"{owner}.{node.attr}"
    return None
