"""A tokenizer of single bytes with a model's special tokens, to check grammars with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

_END = "\u227aend\u227b"
"""Ends the texts of this tokenizer; no model has it, so no grammar means it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteTokenizer:
    """What the grammar library reads."""

    text: str
    """JSON of the tokenizers library."""
    size: int
    """One more than the highest id."""
    end_token_id: int


def byte_tokenizer(special_tokens: Mapping[int, str]) -> ByteTokenizer:
    """Bytes at ids that are free, special tokens at their own."""
    free = (number for number in count() if number not in special_tokens)
    vocabulary = {letter: next(free) for letter in byte_letters()}
    end_token_id = next(free)
    named = {**special_tokens, end_token_id: _END}
    # Tokens that the model's vocabulary lacks would be numbered anew, behind all others.
    vocabulary |= {text: number for number, text in named.items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_added(number, text) for number, text in sorted(named.items())],
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    size = max(vocabulary.values()) + 1
    return ByteTokenizer(text=json.dumps(tokenizer), size=size, end_token_id=end_token_id)


def byte_letters() -> list[str]:
    """One printable letter for each of the 256 bytes.

    Source: GPT-2's byte-level encoding, which the tokenizers library reads.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = count(256)
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def _added(number: int, text: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": text, "special": True, **flags}
