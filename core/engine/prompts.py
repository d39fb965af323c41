"""The forms in which a prompt may come, made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.core.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`."""

_KEYS = {"prompt", "prompt_token_ids"}


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """A prompt as given: text, token ids, or both (the ids count, the text is for show)."""

    text: str | None
    token_ids: list[int] | None


def parse_prompt(prompt: Prompt) -> ParsedPrompt:
    """Reads one prompt. Raises: RequestError for anything that is none."""
    if isinstance(prompt, str):
        return ParsedPrompt(text=prompt, token_ids=None)
    if isinstance(prompt, Mapping):
        return _parse_mapping(prompt)
    if _is_list(prompt):
        return ParsedPrompt(text=None, token_ids=_token_ids(prompt))
    raise RequestError(
        f"a prompt is a text, a list of token ids or a dict, not {type(prompt).__name__}",
        param="prompt",
    )


def split_prompts(prompts: object) -> list[Prompt]:
    """One prompt or a list of them, as a list. A list of numbers is one prompt."""
    if isinstance(prompts, str | Mapping) or not _is_list(prompts):
        return [prompts]  # type: ignore[list-item]  # parse_prompt says what is wrong with it
    items: list[Any] = list(prompts)  # type: ignore[call-overload]
    if items and all(isinstance(item, int) for item in items):
        return [items]
    return items


def _parse_mapping(prompt: Mapping[str, Any]) -> ParsedPrompt:
    unknown = sorted(map(str, set(prompt) - _KEYS))
    if unknown or not set(prompt) & _KEYS:
        has = f"has {', '.join(map(repr, unknown))}" if unknown else "is empty"
        raise RequestError(
            f"a prompt dict holds prompt or prompt_token_ids; this one {has}", param="prompt"
        )
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt must be a text, not {type(text).__name__}", param="prompt")
    if token_ids is not None and not _is_list(token_ids):
        raise RequestError(
            f"prompt_token_ids must be a list of token ids, not {type(token_ids).__name__}",
            param="prompt",
        )
    ids = None if token_ids is None else _token_ids(token_ids)
    if text is None and ids is None:
        raise RequestError("the prompt is None; give a text or token ids", param="prompt")
    return ParsedPrompt(text=text, token_ids=ids)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _token_ids(values: Sequence[Any]) -> list[int]:
    kinds = set(map(type, values))
    if not kinds <= {int}:
        odd = next(value for value in values if type(value) is not int)
        raise RequestError(f"token ids are whole numbers; the prompt holds {odd!r}", param="prompt")
    return list(values)
