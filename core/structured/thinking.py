"""How long one output thinks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quire.core.structured.spec import ThinkingSpec


class ThinkingState:
    """Follows one output and ends its thoughts when they have become too long.

    Owned by the engine core; survives preemption, since it counts tokens. Of a grammar it knows
    nothing: alone, it stands in place of a `GrammarState` that allows everything.
    """

    error: str | None = None
    """Nothing that can be said is wrong here."""
    is_complete = False
    """It never ends an output."""

    def __init__(self, spec: ThinkingSpec, tokenizer: Any, *, vocab_size: int) -> None:
        """`tokenizer`: llguidance's, which knows the text of tokens."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._num_words = -(-vocab_size // 32)
        self._begin = spec.begin
        """What must come before anything counts; None: it has come."""
        self._seen: list[int] = []
        self._num_left = spec.max_tokens
        self._to_say: list[int] | None = None
        """What is left of the end that is said by force; None: not yet."""
        self._is_over = False

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens that were sampled."""
        for token_id in token_ids:
            if not self._is_over:
                self._take(token_id)

    def mask(self) -> bytes | None:
        """Which tokens may follow, as 32-bit words; None: all."""
        if self._is_over or self._begin is not None or self._num_left > 0:
            return None
        if self._to_say is None:
            self._to_say = list(self._spec.end_token_ids)
        words = np.zeros(self._num_words, np.uint32)
        words[self._to_say[0] // 32] = np.uint32(1 << (self._to_say[0] % 32))
        return words.tobytes()

    def _take(self, token_id: int) -> None:
        self._seen.append(token_id)
        if self._begin is not None:
            self._look_for(self._begin)
            return
        self._num_left -= 1
        if self._to_say is not None:
            del self._to_say[0]
        # A token may hold several characters, and a character take up to four tokens.
        del self._seen[: -4 * len(self._spec.end)]
        is_said = self._to_say is not None and not self._to_say
        self._is_over = is_said or self._spec.end in self._tokenizer.decode_str(self._seen)

    def _look_for(self, begin: str) -> None:
        """Whether the output thinks at all."""
        text = self._tokenizer.decode_str(self._seen).lstrip()
        if text.startswith(begin):
            self._begin = None
            self._seen.clear()
        elif not begin.startswith(text):
            self._is_over = True
