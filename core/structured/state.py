"""Where one output is in its grammar."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from quire.core.structured.compiler import CompiledGrammar
from quire.core.structured.thinking import ThinkingState

Words = npt.NDArray[np.int32]


class GrammarState:
    """Follows one output, token by token. Owned by the engine core; survives preemption."""

    def __init__(
        self,
        grammar: CompiledGrammar,
        *,
        vocab_size: int,
        end_token_ids: Iterable[int],
        starts_after: str | None = None,
        thinking: ThinkingState | None = None,
    ) -> None:
        """`end_token_ids` end the output; they are allowed where the grammar may end.

        `thinking` bounds what is said before `starts_after`.
        """
        self._matcher = grammar.start()
        self._num_words = -(-vocab_size // 32)
        self._end_words = _as_words(end_token_ids, self._num_words)
        self._own_ends = ~_as_words(grammar.tokenizer.eos_tokens, self._num_words)
        self._tokenizer = grammar.tokenizer
        self._starts_after = starts_after
        self._thinking = thinking
        self._seen: list[int] = []
        """The last tokens before the grammar begins: as many as its mark could have."""
        self.error: str | None = None
        """Why the grammar cannot be followed any further."""

    @property
    def is_waiting(self) -> bool:
        """Whether everything may still be said, as before the end of a model's thoughts."""
        return self._starts_after is not None

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        if self.is_waiting or self.error is not None:
            return False
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def accept(self, token_ids: Sequence[int]) -> None:
        """Takes in tokens that were sampled; none of them ended the output."""
        for token_id in token_ids:
            if self.is_waiting:
                self._wait(token_id)
            elif self.error is None and not self._matcher.consume_token(token_id):
                self.error = f"token {token_id} does not fit the grammar: {self._reason()}"

    def mask(self) -> bytes | None:
        """Which tokens may follow, as 32-bit words; None: all. None may, where `error` is set."""
        if self.is_waiting:
            return None if self._thinking is None else self._thinking.mask()
        if self.error is not None:
            return bytes(4 * self._num_words)
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)[: self._num_words]
        if self._matcher.is_error():
            self.error = f"the grammar is too complex to go on: {self._reason()}"
            return bytes(4 * self._num_words)
        words = words & self._own_ends
        if self._matcher.is_accepting():
            words = words | self._end_words
        return words.tobytes()

    def _wait(self, token_id: int) -> None:
        assert self._starts_after is not None, token_id
        if self._thinking is not None:
            self._thinking.accept([token_id])
        self._seen.append(token_id)
        del self._seen[: -4 * len(self._starts_after)]
        if self._starts_after in self._tokenizer.decode_str(self._seen):
            self._starts_after = None
            self._seen.clear()

    def _reason(self) -> str:
        return " ".join(str(self._matcher.get_error()).split())[:300]


def _as_words(token_ids: Iterable[int], num_words: int) -> Words:
    """Bits of the given tokens, [num_words]."""
    words = np.zeros(num_words, np.uint32)
    for token_id in token_ids:
        if 0 <= token_id < 32 * num_words:
            words[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return words.view(np.int32)
