"""The text of one output: detokenized, and ended at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from quire.core.engine.detokenizer import Detokenizer, TokenDecoder
from quire.core.engine.stop_strings import StopFilter
from quire.core.sampling_params import SamplingParams


class OutputText:
    """Takes tokens and gives text that is certain."""

    __slots__ = (
        "_detokenizer",
        "_includes_stop",
        "_min_tokens",
        "_num_tokens",
        "_stop_filter",
        "stop",
    )

    def __init__(
        self, params: SamplingParams, decoder: TokenDecoder, prompt_token_ids: Sequence[int]
    ) -> None:
        self._detokenizer = Detokenizer(
            decoder,
            prompt_token_ids=prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
        )
        stops = params.stop_strings
        self._includes_stop = params.include_stop_str_in_output
        self._stop_filter = StopFilter(stops, is_included=self._includes_stop) if stops else None
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self.stop: str | None = None
        """The stop string that ended the text."""

    def append(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """The new text, and how many of the tokens count: all, unless a stop string came before."""
        if self._stop_filter is None:
            return self._detokenizer.extend(token_ids), len(token_ids)
        pieces = []
        for number, token_id in enumerate(token_ids, 1):
            pieces.append(self._filtered(self._detokenizer.append(token_id)))
            if self.stop is not None:
                return "".join(pieces), number
        return "".join(pieces), len(token_ids)

    def whole(self, token_ids: Sequence[int], *, is_stop_token: bool) -> str:
        """The text of an output without stop strings, none of whose tokens was appended before."""
        is_hidden = is_stop_token and not self._includes_stop and bool(token_ids)
        return self._detokenizer.finish_with(token_ids[:-1] if is_hidden else token_ids)

    def finish(self, last_token_ids: Sequence[int], *, is_stop_token: bool) -> tuple[str, int]:
        """The text of the last tokens and all that was held back, and how many tokens count.

        `is_stop_token`: the last token ended the output; its own text is left out unless
        stops are included.
        """
        is_hidden = is_stop_token and not self._includes_stop and bool(last_token_ids)
        shown = last_token_ids[:-1] if is_hidden else last_token_ids
        text, count = self.append(shown)
        if self.stop is not None:
            return text, count
        rest = self._detokenizer.finish()
        if self._stop_filter is not None:
            rest = self._filtered(rest)
            rest += self._stop_filter.flush()
        return text + rest, len(last_token_ids)

    def _filtered(self, delta: str) -> str:
        self._num_tokens += 1
        if self._stop_filter is None or self._num_tokens < self._min_tokens:
            return delta
        text, self.stop = self._stop_filter.feed(delta)
        return text
