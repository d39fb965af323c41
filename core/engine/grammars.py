"""What a user asks of an output's form, as the engine's own records."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire.core.engine.tokenizer import TextCodec, load_codec, no_tokenizer
from quire.core.errors import CheckpointError, RequestError
from quire.core.sampling_params import SamplingParams, StructuredOutputsParams, ThinkingLimit
from quire.core.structured.compiler import GrammarChecker, GrammarCompiler
from quire.core.structured.spec import (
    ConstraintSpec,
    GrammarKind,
    GrammarSpec,
    ThinkingSpec,
)

_KINDS: dict[str, GrammarKind] = {
    "json": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}


def constraint_of(params: SamplingParams, codec: TextCodec | None) -> ConstraintSpec | None:
    """The constraint that a request asks for.

    Raises: RequestError for what JSON cannot hold, and for a bound of thoughts without a
    tokenizer.
    """
    asked = params.structured_outputs
    if asked is None and params.thinking_limit is None:
        return None
    assert asked is None or isinstance(asked, StructuredOutputsParams), asked
    return ConstraintSpec(
        grammar=None if asked is None else _grammar_of(asked),
        starts_after=None if asked is None else asked.starts_after,
        thinking=_thinking_of(params.thinking_limit, codec),
    )


def _thinking_of(limit: ThinkingLimit | None, codec: TextCodec | None) -> ThinkingSpec | None:
    if limit is None:
        return None
    tokens = [] if codec is None else codec.encode(limit.end, add_special_tokens=False)
    if not tokens:
        raise RequestError(
            f"thoughts cannot be ended: there is no tokenizer that writes {limit.end!r}; "
            "leave their limit out",
            param="thinking_limit",
        )
    return ThinkingSpec(
        begin=limit.begin,
        end=limit.end,
        end_token_ids=tuple(tokens),
        max_tokens=limit.max_tokens,
    )


def _grammar_of(asked: StructuredOutputsParams) -> GrammarSpec:
    form = asked.forms[0]
    value = getattr(asked, form)
    return GrammarSpec(
        kind=_KINDS[form],
        text="" if form == "json_object" else _text_of(value, form),
        whitespace_pattern=asked.whitespace_pattern,
        disable_any_whitespace=asked.disable_any_whitespace,
        disable_additional_properties=asked.disable_additional_properties,
    )


def front_checker(codec: TextCodec | None, model: str, vocab_size: int) -> GrammarChecker:
    """With what the front finds out whether a grammar is one."""

    def read() -> dict[int, str]:
        if codec is None:
            raise no_tokenizer(model)
        known = _require_fast(codec).get_added_tokens_decoder()
        return {number: str(token.content) for number, token in known.items()}

    return GrammarChecker(read, vocab_size=vocab_size)


def core_compiler(directory: str, tokenizer: str | None, vocab_size: int) -> GrammarCompiler:
    """The compiler of an engine core, which reads the tokenizer when the first grammar comes."""

    def read() -> str:
        file = Path(tokenizer or directory) / "tokenizer.json"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        codec = load_codec(directory, tokenizer=tokenizer)
        if codec is None:
            raise no_tokenizer(directory)
        return tokenizer_json(codec)

    return GrammarCompiler(read, vocab_size=vocab_size)


def tokenizer_json(codec: TextCodec) -> str:
    """A tokenizer as JSON of the tokenizers library.

    Raises: CheckpointError for one that has no such form.
    """
    return str(_require_fast(codec).to_str())


def _require_fast(codec: TextCodec) -> Any:
    backend = getattr(codec.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            "structured output needs a fast tokenizer (tokenizer.json), and this model has none; "
            "convert it, or name another with tokenizer=..."
        )
    return backend


def _text_of(value: Any, form: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(dict(value) if isinstance(value, Mapping) else value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(
            f"structured_outputs.{form} is not JSON: {error}", param=f"structured_outputs.{form}"
        ) from error
