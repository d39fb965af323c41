"""Tokens to text, one at a time: what is handed out is never taken back and never half a character.

A token's text depends on its neighbours (a leading space that is stripped, bytes of one character
in several tokens), so a window of the last tokens is decoded at each step, and what is new at its
end is handed out. The window is short and moves on, so that a token costs the same however long the
output is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"
"""What decoders show for bytes that are no character (yet)."""
_CONTEXT_TOKENS = 4
"""Tokens before the new one that a decoder may look at; a character has at most four bytes."""
_MAX_WINDOW_TOKENS = 64
"""Where the window is cut although its start is not known to be the start of a character."""


class TokenDecoder(Protocol):
    """What a detokenizer needs of a tokenizer."""

    special_ids: frozenset[int]
    """Ids that `skip_special_tokens` leaves out."""
    byte_values: dict[int, int]
    """Ids that stand for one byte each (byte fallback), to the byte."""
    num_known_ids: int
    """Ids from here on have no text: models round their vocabulary up."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of all ids together, bytes that are no character as U+FFFD."""
        ...


class Detokenizer:
    """The text of one output, token by token.

    The deltas and `finish` together are `decode(prompt + output)` without its start
    `decode(prompt)`. One exception: of byte-fallback tokens that are no valid UTF-8 decoders
    discard the valid characters too; here these stay.
    """

    __slots__ = (
        "_byte_values",
        "_bytes",
        "_cut",
        "_decoder",
        "_is_in_bytes",
        "_num_emitted",
        "_num_known_ids",
        "_skip_special_tokens",
        "_skipped_ids",
        "_window",
    )

    def __init__(
        self,
        decoder: TokenDecoder,
        *,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._skipped_ids = decoder.special_ids if skip_special_tokens else frozenset[int]()
        self._num_known_ids = decoder.num_known_ids
        self._byte_values = decoder.byte_values
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_in_bytes = False
        self._window = self._end_of_prompt(prompt_token_ids)
        self._num_emitted = len(self._decode(self._window)) if self._window else 0
        self._cut = len(self._window)
        """Where a character starts in the window, so that what is before may be dropped."""

    def append(self, token_id: int) -> str:
        """Takes the next token and returns the text that is now certain."""
        if token_id in self._skipped_ids or token_id >= self._num_known_ids:
            return ""
        if token_id in self._byte_values:
            return self._append_byte(token_id)
        before = self._leave_bytes() if self._is_in_bytes else ""
        self._window.append(token_id)
        return before + self._news()

    def extend(self, token_ids: Sequence[int]) -> str:
        """`append` of several: the same text, decoded once."""
        byte_values = self._byte_values
        if len(token_ids) == 1 or self._is_in_bytes or not byte_values.keys().isdisjoint(token_ids):
            return "".join(map(self.append, token_ids))
        skipped, num_known = self._skipped_ids, self._num_known_ids
        known = [one for one in token_ids if one not in skipped and one < num_known]
        if not known:
            return ""
        self._window += known
        return self._news()

    def _news(self) -> str:
        """The text that the end of the window makes certain."""
        window = self._window
        text = self._decode(window)
        is_unfinished = text.endswith(_UNFINISHED)
        end = len(text) - is_unfinished
        delta = text[self._num_emitted : end]
        self._num_emitted = max(self._num_emitted, end)
        if not is_unfinished and len(window) - self._cut >= _CONTEXT_TOKENS:
            self._move_window()
        elif len(window) > _MAX_WINDOW_TOKENS:
            self._cut_window(len(text) - self._num_emitted)
        return delta

    def finish_with(self, token_ids: Sequence[int]) -> str:
        """Takes all tokens that are left and returns their text, at the price of one."""
        if self._byte_values:
            return "".join(map(self.append, token_ids)) + self.finish()
        self._window += [
            token_id
            for token_id in token_ids
            if token_id not in self._skipped_ids and token_id < self._num_known_ids
        ]
        return self.finish()

    def finish(self) -> str:
        """The text that was held back: bytes that stayed half a character."""
        if self._is_in_bytes:
            return self._leave_bytes()
        if not self._window:
            return ""
        text = self._decode(self._window)
        delta = text[self._num_emitted :]
        self._num_emitted = len(text)
        return delta

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def _end_of_prompt(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens that have text: the output's first space depends on them."""
        tail = [
            token_id
            for token_id in prompt_token_ids[-4 * _CONTEXT_TOKENS :]
            if token_id not in self._skipped_ids and token_id < self._num_known_ids
        ]
        return tail[-2 * _CONTEXT_TOKENS :]

    def _append_byte(self, token_id: int) -> str:
        """Byte tokens are decoded here: a decoder shows garbage until the last byte of a run."""
        self._is_in_bytes = True
        self._window.append(token_id)
        text = self._bytes.decode(bytes((self._byte_values[token_id],)))
        is_first = len(self._window) == 1
        # Some decoders strip a space at the very start.
        return "" if is_first and text == " " and not self._decode(self._window) else text

    def _leave_bytes(self) -> str:
        """Ends a run of bytes; from here the window counts again."""
        self._is_in_bytes = False
        rest = self._bytes.decode(b"", final=True)
        self._bytes.reset()
        del self._window[: -4 * _CONTEXT_TOKENS]
        self._num_emitted = len(self._decode(self._window))
        self._cut = 0
        return rest

    def _move_window(self) -> None:
        """Drops what lies before the cut, if the rest has text to stand for what came before."""
        rest = self._window[self._cut :]
        text = self._decode(rest)
        if text:
            self._window = rest
            self._num_emitted = len(text)
        self._cut = len(self._window)

    def _cut_window(self, num_held: int) -> None:
        """Keeps the last tokens alone.

        `num_held` characters at their end are still to be handed out.
        """
        self._window = self._window[-2 * _CONTEXT_TOKENS :]
        self._num_emitted = max(len(self._decode(self._window)) - num_held, 0)
        self._cut = 0
