"""JSON schemas made for measuring and testing structured output: by name, what is hard about each.

All are bounded, so that a model which knows nothing still comes to an end.
"""

from __future__ import annotations

from typing import Any


def obj(properties: dict[str, Any], *, optional: tuple[str, ...] = (), **more: Any) -> dict:
    """An object with these properties and no others."""
    required = [name for name in properties if name not in optional]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **more,
    }


WORD = {"type": "string", "maxLength": 6}
SMALL = {"type": "integer", "minimum": 0, "maximum": 99}
COLOR = {"enum": ["red", "green", "blue"]}
FLAG = {"type": "boolean"}

SCHEMAS: dict[str, dict[str, Any]] = {
    # values
    "boolean": FLAG,
    "null": {"type": "null"},
    "integer in a range": {"type": "integer", "minimum": -5, "maximum": 17},
    "integer above": {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    "large range": {"type": "integer", "minimum": 100, "maximum": 100000},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "number in a range": {"type": "number", "minimum": 0, "maximum": 1},
    "string of a length": {"type": "string", "minLength": 3, "maxLength": 5},
    "empty string": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "pattern with choices": {"type": "string", "pattern": "^(foo|ba[rz])+x$", "maxLength": 20},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 20},
    "date-time": {"type": "string", "format": "date-time", "maxLength": 30},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "email": {"type": "string", "format": "email", "maxLength": 24},
    "enum of texts": COLOR,
    "enum of kinds": {"enum": ["a", 1, None, True, 2.5]},
    "enum of escapes": {"enum": ['say "hi"', "back\\slash", "new\nline", "tab\t", "é", "日本"]},
    "enum of structures": {"enum": [{"a": [1, 2]}, [], {}]},
    "const": {"const": "only this"},
    "const structure": {"const": {"k": ["v", 1]}},
    "several types": {"type": ["boolean", "null"]},
    "several types with limits": {
        "type": ["integer", "boolean"],
        "minimum": 0,
        "maximum": 9,
    },
    # objects
    "empty object": obj({}),
    "one property": obj({"a": SMALL}),
    "two properties": obj({"color": COLOR, "on": FLAG}),
    "optional first": obj({"a": SMALL, "b": FLAG}, optional=("a",)),
    "optional last": obj({"a": SMALL, "b": FLAG}, optional=("b",)),
    "all optional": obj({"a": SMALL, "b": FLAG, "c": COLOR}, optional=("a", "b", "c")),
    "nested": obj({"in": obj({"deep": obj({"x": SMALL})})}),
    "odd names": obj({"with space": FLAG, 'qu"ote': FLAG, "ünï": FLAG, "": FLAG}),
    "names with a common beginning": obj({"a": FLAG, "ab": FLAG, "abc": FLAG}),
    "required by order": obj({"z": FLAG, "a": FLAG, "m": FLAG}),
    "many properties": obj({f"p{index}": FLAG for index in range(20)}),
    "words": obj({"first": WORD, "last": WORD}),
    "person": obj({"name": WORD, "age": SMALL, "color": COLOR}),
    "nullable": obj({"a": {"anyOf": [SMALL, {"type": "null"}]}}),
    "open, of one kind": {
        "type": "object",
        "properties": {"a": FLAG},
        "required": ["a"],
        "additionalProperties": False,
    },
    # arrays
    "empty array": {"type": "array", "items": FLAG, "maxItems": 0},
    "array of a length": {"type": "array", "items": FLAG, "minItems": 3, "maxItems": 3},
    "array in a range": {"type": "array", "items": SMALL, "minItems": 1, "maxItems": 4},
    "array of objects": {
        "type": "array",
        "items": obj({"a": SMALL, "b": COLOR}),
        "minItems": 1,
        "maxItems": 3,
    },
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 2},
        "minItems": 2,
        "maxItems": 2,
    },
    "tuple": {"type": "array", "prefixItems": [SMALL, COLOR, FLAG], "items": False, "minItems": 3},
    "tuple and rest": {
        "type": "array",
        "prefixItems": [COLOR],
        "items": SMALL,
        "minItems": 1,
        "maxItems": 4,
    },
    "array of choices": {
        "type": "array",
        "items": {"anyOf": [SMALL, COLOR]},
        "minItems": 1,
        "maxItems": 4,
    },
    # combinations
    "any of values": {"anyOf": [SMALL, COLOR, {"type": "null"}]},
    "any of objects": {"anyOf": [obj({"cat": FLAG}), obj({"dog": SMALL})]},
    "tagged union": {
        "anyOf": [
            obj({"kind": {"const": "circle"}, "radius": SMALL}),
            obj({"kind": {"const": "square"}, "side": SMALL}),
        ]
    },
    "one of apart": {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "all of objects": {
        "allOf": [
            {"type": "object", "properties": {"a": SMALL}, "required": ["a"]},
            {"properties": {"b": FLAG}, "required": ["b"]},
        ],
        "additionalProperties": False,
        "properties": {"a": True, "b": True},
    },
    # references
    "definition": {"$defs": {"c": COLOR}, "$ref": "#/$defs/c"},
    "definitions in properties": {
        **obj({"a": {"$ref": "#/$defs/small"}, "b": {"$ref": "#/$defs/small"}}),
        "$defs": {"small": SMALL},
    },
    "old definitions": {**obj({"a": {"$ref": "#/definitions/f"}}), "definitions": {"f": FLAG}},
    "definition of a definition": {
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": obj({"x": FLAG})},
        "$ref": "#/$defs/a",
    },
    "reference to a property": obj({"a": COLOR, "b": {"$ref": "#/properties/a"}}),
    # everyday
    "weather call": obj(
        {"city": WORD, "unit": {"enum": ["celsius", "fahrenheit"]}, "days": SMALL},
        optional=("days",),
    ),
    "invoice": obj(
        {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4}$"},
            "lines": {
                "type": "array",
                "items": obj({"item": WORD, "count": SMALL}),
                "minItems": 1,
                "maxItems": 2,
            },
            "paid": FLAG,
        }
    ),
    "classification": obj(
        {
            "label": {"enum": ["spam", "ham"]},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        }
    ),
    "move": obj(
        {"from": {"type": "string", "pattern": "^[a-h][1-8]$"}, "promotion": {"enum": ["q", None]}}
    ),
    "settings": obj(
        {
            "title": {"type": "string", "maxLength": 6, "title": "Title", "description": "shown"},
            "theme": {"default": "dark", "enum": ["dark", "light"]},
        },
        title="Settings",
        description="of a page",
    ),
    "with dialect": {"$schema": "https://json-schema.org/draft/2020-12/schema", **obj({"a": FLAG})},
}

REFUSED: dict[str, Any] = {
    "unknown type": {"type": "strin"},
    "unique items": {"type": "array", "items": SMALL, "uniqueItems": True},
    "not": {"not": {"type": "integer"}},
    "overlapping one of": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "missing definition": {"$ref": "#/$defs/nowhere"},
    "elsewhere": {"$ref": "https://example.com/schema.json"},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "nothing": False,
    "contradiction": {"type": "integer", "minimum": 5, "maximum": 3},
    "if": {"if": {"properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
}
"""Schemas that cannot be held: who asks is told why, instead of being given what does not fit."""
