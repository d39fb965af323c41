"""Guesses at what a request says next, from what stands in its own text.

Text repeats itself: code, quotations, lists, answers about a document. Where the last tokens stood
before, what followed them then is a good guess, and costs no model. Source: Saxena 2023, prompt
lookup decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.interface.worker import SamplingSpec

LONGEST, SHORTEST = 4, 2
"""Of the runs of tokens that are looked up, the longest first."""


class PromptLookup:
    """The places of all short runs of tokens in one request's text. Grows with it."""

    __slots__ = ("_end", "_num_seen")

    def __init__(self) -> None:
        self._end: dict[tuple[int, ...], int] = {}
        """Where the last run of these tokens ends, the one at the text's own end excepted."""
        self._num_seen = 0

    def guess(self, token_ids: Sequence[int], limit: int) -> list[int]:
        """At most `limit` tokens that may follow `token_ids`; only ever called on longer ones."""
        self._read(token_ids)
        length = len(token_ids)
        for size in range(min(LONGEST, length), SHORTEST - 1, -1):
            end = self._end.get(tuple(token_ids[length - size :]))
            if end is not None:
                return list(token_ids[end : end + limit])
        return []

    def _read(self, token_ids: Sequence[int]) -> None:
        """Notes the runs that end before the last token."""
        for end in range(max(self._num_seen, SHORTEST), len(token_ids)):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._end[tuple(token_ids[end - size : end])] = end
        self._num_seen = max(self._num_seen, len(token_ids))


def may_guess(sampling: SamplingSpec) -> bool:
    """Whether a request's sampling allows guesses; see `StepBatch.draft_token_ids`."""
    depends_on_output = (
        sampling.has_penalties
        or sampling.bad_words
        or sampling.min_tokens
        or sampling.logits_processors
    )
    wants_logprobs = sampling.num_logprobs is not None or sampling.num_prompt_logprobs is not None
    return not depends_on_output and not wants_logprobs
