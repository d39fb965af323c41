"""From what a user wrote to the one form that the compiler reads.

Source: the forms of vLLM's structured outputs; the grammar language of llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from quire.core.errors import RequestError
from quire.core.structured.spec import MAX_GRAMMAR_CHARS, GrammarSpec

DEFAULT_WHITESPACE = r"( |\n[ \t]{0,64})?"
"""Between the tokens of JSON. Bounded: a model that likes spaces would never come to an end."""

_DATE = (
    r"(([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29"
    r"|([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-"
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    r"|02-(0[1-9]|1[0-9]|2[0-8])))"
)
_TIME = (
    r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    r"(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_FORMATS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}
"""Formats that the library takes less exactly: it knows no leap years, and lets every minute have
61 seconds.
"""

_PARAMS = {"json_schema": "json", "json_object": "json_object"}
_TRIGGER_TEXT = r"(.|\n)*"


def param_of(spec: GrammarSpec) -> str:
    """The field that errors name."""
    return f"structured_outputs.{_PARAMS.get(spec.kind, spec.kind)}"


def to_compiler_text(spec: GrammarSpec) -> str:
    """The grammar as llguidance reads it. Says nothing yet about whether it compiles.

    Raises: RequestError for what is too long, no JSON, or not of the form that its kind has.
    """
    if len(spec.text) > MAX_GRAMMAR_CHARS:
        raise RequestError(
            f"the grammar has {len(spec.text)} characters; at most {MAX_GRAMMAR_CHARS} are "
            "compiled; make it shorter",
            param=param_of(spec),
        )
    match spec.kind:
        case "json_schema":
            return _json_grammar(_read_schema(spec), spec)
        case "json_object":
            return _json_grammar({"type": "object"}, spec)
        case "regex":
            return _lark(f"start: {_regex_literal(_without_anchors(spec.text))}")
        case "choice":
            return _lark(_choice_rules(spec))
        case "grammar":
            return _lark(_as_lark(spec))
        case "structural_tag":
            return _structural_tag(spec)


def _lark(text: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _json_grammar(schema: Any, spec: GrammarSpec) -> str:
    return json.dumps({"grammars": [{"json_schema": _with_options(schema, spec)}]})


def _with_options(schema: Any, spec: GrammarSpec) -> Any:
    if schema is True:
        schema = {}
    schema = _with_exact_formats(schema)
    if spec.disable_additional_properties:
        schema = _closed(schema)
    if isinstance(schema, Mapping):
        return {**schema, "x-guidance": _json_options(spec)}
    return schema


def _json_options(spec: GrammarSpec) -> dict[str, Any]:
    """Options of a request's schema itself are not read: they could turn off what holds."""
    if spec.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": spec.whitespace_pattern or DEFAULT_WHITESPACE}


def _with_exact_formats(schema: Any) -> Any:
    """The schema with patterns in place of the formats that are known better here."""
    if isinstance(schema, list):
        return [_with_exact_formats(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    exact = {
        key: value
        if key in ("const", "enum", "default", "examples")
        else _with_exact_formats(value)
        for key, value in schema.items()
    }
    name = exact.get("format")
    if isinstance(name, str) and name in _FORMATS and "pattern" not in exact:
        del exact["format"]
        exact["pattern"] = f"^{_FORMATS[name]}$"
    return exact


def _closed(schema: Any) -> Any:
    """The schema with `additionalProperties: false` wherever properties are named."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _read_schema(spec: GrammarSpec) -> Any:
    schema = _read_json(spec)
    if schema is False:
        raise RequestError(
            "the schema `false` allows nothing; give one that some text fits", param=param_of(spec)
        )
    if schema is not True and not isinstance(schema, dict):
        raise RequestError(
            f"a JSON schema is an object, not {type(schema).__name__}", param=param_of(spec)
        )
    return schema


def _read_json(spec: GrammarSpec) -> Any:
    try:
        return json.loads(spec.text)
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{param_of(spec)} is not JSON: {error}", param=param_of(spec)
        ) from error


def _without_anchors(regex: str) -> str:
    """The expression without `^` and `$` around it: the whole output fits it in any case."""
    regex = regex.removeprefix("^")
    if regex.endswith("$") and not _ends_escaped(regex):
        regex = regex[:-1]
    return regex


def _ends_escaped(regex: str) -> bool:
    backslashes = len(regex) - 1 - len(regex[:-1].rstrip("\\"))
    return backslashes % 2 == 1


def _regex_literal(regex: str) -> str:
    """A regular expression between slashes."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex, use_ascii='d')}/"


def _choice_rules(spec: GrammarSpec) -> str:
    choices = _read_json(spec)
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, str) and choice for choice in choices)
    ):
        raise RequestError(
            "choice must be a list of at least one text, none of them empty", param=param_of(spec)
        )
    return "start: " + " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))


def _as_lark(spec: GrammarSpec) -> str:
    """Lark as it is; EBNF as llama.cpp and xgrammar write it (`::=`), translated."""
    if not re.search(r"^[ \t]*[A-Za-z_][\w-]*[ \t\n]*::=", spec.text, re.MULTILINE):
        return spec.text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(spec.text))
    except Exception as error:  # the translator raises plain Exceptions for what it cannot read
        raise RequestError(f"the grammar cannot be read: {error}", param=param_of(spec)) from error


def _structural_tag(spec: GrammarSpec) -> str:
    """Free text in which certain beginnings oblige: after `begin`, the schema, then `end`."""
    tag = _read_json(spec)
    structures = tag.get("structures") if isinstance(tag, dict) else None
    if isinstance(structures, list) and structures and "otherwise" in tag:
        return _structures_or_answer(tag, spec)
    triggers = tag.get("triggers") if isinstance(tag, dict) else None
    if not isinstance(structures, list) or not structures or not isinstance(triggers, list):
        raise RequestError(
            'a structural tag has "structures" (each with begin, schema, end) and "triggers"',
            param=param_of(spec),
        )
    rules = ["%llguidance {}", f"TAG_TEXT: /{_TRIGGER_TEXT}/", "tag_end: TAG_TEXT"]
    names = [f"tag_{index}" for index in range(len(structures))]
    rules.append(f"start: ({' | '.join(names)})* tag_end")
    for name, structure in zip(names, structures, strict=True):
        rules += _tag_rules(name, structure, triggers, spec)
    return _lark("\n".join(rules))


def _structures_or_answer(tag: Mapping[str, Any], spec: GrammarSpec) -> str:
    """Structures alone, several with `between` between them, or else JSON of a schema."""
    answer, between = tag["otherwise"], tag.get("between")
    if not _is_schema(answer) or not isinstance(between, str | None):
        raise RequestError(
            "otherwise is a schema, and between a text or absent", param=param_of(spec)
        )
    rules = [f"answer: %json {json.dumps(_with_options(answer, spec))}"]
    names = [f"tag_{index}" for index in range(len(tag["structures"]))]
    for name, structure in zip(names, tag["structures"], strict=True):
        begin, end, schema = _parts_of(structure, spec)
        close = f" {json.dumps(end)}" if end else ""
        body = json.dumps(_with_options(schema, spec))
        rules.append(f"{name}: {json.dumps(begin)} %json {body}{close}")
    more = f" ({json.dumps(between)} tag)*" if between else "" if between is None else " tag*"
    rules += [f"tag: {' | '.join(names)}", f"tags: tag{more}"]
    return _lark("\n".join(["%llguidance {}", "start: answer | tags", *rules]))


def _tag_rules(
    name: str, structure: Any, triggers: list[Any], spec: GrammarSpec
) -> tuple[str, str]:
    begin, end, schema = _parts_of(structure, spec)
    trigger = next((t for t in triggers if isinstance(t, str) and t and begin.startswith(t)), None)
    if trigger is None:
        raise RequestError(
            f"the structure that begins with {begin[:60]!r} begins with none of the triggers",
            param=param_of(spec),
        )
    body = f"%json {json.dumps(_with_options(schema, spec))}"
    rest = "".join(f"{json.dumps(text)} " for text in (begin[len(trigger) :],) if text)
    close = f" {json.dumps(end)}" if end else ""
    return (
        f"{name}_trigger[lazy]: TAG_TEXT {json.dumps(trigger)}",
        f"{name}: {name}_trigger {rest}{body}{close}",
    )


def _parts_of(structure: Any, spec: GrammarSpec) -> tuple[str, str, Any]:
    if isinstance(structure, dict):
        begin, end = structure.get("begin"), structure.get("end", "")
        schema = structure.get("schema", True)
        if isinstance(begin, str) and begin and isinstance(end, str) and _is_schema(schema):
            return begin, end, schema
    raise RequestError(
        f"a structure has begin, end and schema, not {str(structure)[:80]}", param=param_of(spec)
    )


def _is_schema(schema: Any) -> bool:
    return isinstance(schema, dict) or schema is True
