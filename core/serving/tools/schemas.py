"""Schemas of the calls that a request obliges a model to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NO_ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


def arguments_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of one tool's arguments; without one, none are taken."""
    parameters = function.get("parameters")
    if not parameters:
        return _NO_ARGUMENTS
    return {"type": "object", **parameters}


def call_list_schema(
    functions: Sequence[Mapping[str, Any]], *, is_parallel: bool
) -> dict[str, Any]:
    """A list of at least one call: `[{"name": ..., "parameters": {...}}]`."""
    definitions = {f"tool{i}": _moved(arguments_schema(f), i) for i, f in enumerate(functions)}
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "parameters": {"$ref": f"#/$defs/tool{index}"},
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, function in enumerate(functions)
    ]
    limit = {} if is_parallel else {"maxItems": 1}
    return {
        "type": "array",
        "minItems": 1,
        **limit,
        "items": {"anyOf": calls},
        "$defs": definitions,
    }


def _moved(schema: Any, index: int) -> Any:
    """A schema whose references within itself still hold where it now stands."""
    if isinstance(schema, list):
        return [_moved(item, index) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, index) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = f"#/$defs/tool{index}{reference[1:]}"
    return moved
