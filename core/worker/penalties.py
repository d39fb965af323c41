"""Which tokens a request has seen, kept for those requests that are penalised for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


class SeenTokens:
    """The distinct tokens of one request and how often each stands in its output.

    Grows with every output token, so that a step costs a copy and no count over the history.
    """

    def __init__(self, prompt: Sequence[int], output: Iterable[int]) -> None:
        distinct = np.unique(np.asarray(prompt, np.int64))
        self._size = len(distinct)
        self._token_ids = np.empty(2 * self._size + 64, np.int64)
        self._token_ids[: self._size] = distinct
        self._counts = np.zeros(len(self._token_ids), np.float32)
        self._entry_of = {token: entry for entry, token in enumerate(distinct.tolist())}
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        """Counts one more token of the output."""
        entry = self._entry_of.get(token)
        if entry is None:
            entry = self._new_entry(token)
        self._counts[entry] += 1

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """The distinct tokens of prompt and output: int64 [M]. A view, valid until `append`."""
        return self._token_ids[: self._size]

    @property
    def output_counts(self) -> npt.NDArray[np.float32]:
        """How often each stands in the output, 0 if in the prompt alone: float32 [M]. A view."""
        return self._counts[: self._size]

    def _new_entry(self, token: int) -> int:
        if self._size == len(self._token_ids):
            self._token_ids = np.concatenate([self._token_ids, np.empty_like(self._token_ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        entry = self._size
        self._token_ids[entry] = token
        self._entry_of[token] = entry
        self._size += 1
        return entry
