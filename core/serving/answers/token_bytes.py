"""The bytes of a token, also of one that is only a part of a character."""

from __future__ import annotations

import functools
import re
from typing import Any

from quire.core.outputs import Logprob

_HALF = "\ufffd"
"""What decoding shows for bytes that are no whole character."""
_BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Knows a vocabulary: byte-level pieces and byte-fallback tokens keep their bytes."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer` is one of transformers, or None where the model has none."""
        self._tokenizer = tokenizer

    def of(self, token_id: int, entry: Logprob, name: str) -> list[int]:
        """UTF-8 of the token's text; its own bytes where that is not whole; else of its name."""
        text = entry.decoded_token
        if text is None:
            return list(name.encode())
        if _HALF in text and self._tokenizer is not None:
            piece = self._tokenizer.convert_ids_to_tokens(token_id)
            raw = bytes_of_piece(piece) if isinstance(piece, str) else None
            if raw is not None:
                return list(raw)
        return list(text.encode("utf-8", "replace"))


def bytes_of_piece(piece: str) -> bytes | None:
    """The bytes of a vocabulary's piece: `<0xE4>`, or letters of the byte-level alphabet."""
    named = _BYTE_NAME.fullmatch(piece)
    if named:
        return bytes([int(named[1], 16)])
    alphabet = _byte_alphabet()
    if piece and all(letter in alphabet for letter in piece):
        return bytes(alphabet[letter] for letter in piece)
    return None


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Letter to byte. Printable bytes are their own letters; the others follow from U+0100 on.

    Source: `bytes_to_unicode` of GPT-2, which every byte-level BPE has kept.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    alphabet = {chr(value): value for value in printable}
    return alphabet | {chr(0x100 + index): value for index, value in enumerate(others)}
