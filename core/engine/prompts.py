"""The forms in which a prompt may come, made one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.core.errors import RequestError

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.

With `"multi_modal_data": {"audio": (samples, rate)}` beside it for models that take more than text;
`{"encoder_prompt": prompt, "decoder_prompt": prompt or None}` for models with an encoder.
"""

_KEYS = {"prompt", "prompt_token_ids", "multi_modal_data"}
_PAIR_KEYS = {"encoder_prompt", "decoder_prompt"}


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """A prompt as given: text, token ids, or both (the ids count, the text is for show)."""

    text: str | None
    token_ids: list[int] | None
    data: Mapping[str, Any] = field(default_factory=dict)
    """What it brings besides text, by kind, as the user gave it."""
    source: ParsedPrompt | None = None
    """What an encoder is to read, where encoder and decoder were given apart."""

    @property
    def is_plain(self) -> bool:
        """Whether it is text or tokens alone."""
        return not self.data and self.source is None


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
    if set(prompt) & _PAIR_KEYS:
        return _parse_pair(prompt)
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
    data = prompt.get("multi_modal_data") or {}
    if not isinstance(data, Mapping):
        raise RequestError(
            f"multi_modal_data is a dict by kind, not {type(data).__name__}",
            param="multi_modal_data",
        )
    if text is None and ids is None and not data:
        raise RequestError("the prompt is None; give a text or token ids", param="prompt")
    return ParsedPrompt(text=text, token_ids=ids, data=data)


def _parse_pair(prompt: Mapping[str, Any]) -> ParsedPrompt:
    """Encoder and decoder apart, in the names that vLLM uses."""
    unknown = sorted(map(str, set(prompt) - _PAIR_KEYS))
    if unknown or prompt.get("encoder_prompt") is None:
        what = f"has {', '.join(map(repr, unknown))}" if unknown else "has no encoder_prompt"
        raise RequestError(
            f"a prompt of two parts holds encoder_prompt and decoder_prompt; this one {what}",
            param="prompt",
        )
    source = parse_prompt(prompt["encoder_prompt"])
    own = prompt.get("decoder_prompt")
    target = ParsedPrompt(text=None, token_ids=None) if own is None else parse_prompt(own)
    if not target.is_plain or source.source is not None:
        raise RequestError("decoder_prompt is text or token ids alone", param="prompt")
    return ParsedPrompt(
        text=target.text,
        token_ids=target.token_ids,
        data=source.data,
        source=ParsedPrompt(text=source.text, token_ids=source.token_ids),
    )


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _token_ids(values: Sequence[Any]) -> list[int]:
    kinds = set(map(type, values))
    if not kinds <= {int}:
        odd = next(value for value in values if type(value) is not int)
        raise RequestError(f"token ids are whole numbers; the prompt holds {odd!r}", param="prompt")
    return list(values)
