"""Whisper's rule of times, as a logits processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from quire.core.models.model_config import read_json

TIMESTAMP_RULE = "whisper_timestamps"
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimestampRule:
    """Times come in pairs, never go back, and the first token is one.

    Where all times together are likelier than any single other token, one of them is taken.
    Source: Radford et al. 2022, section 2.3, and `ApplyTimestampRules` of the program beside it.
    """

    no_timestamps: int
    end: int
    max_initial: int | None
    suppressed: tuple[int, ...]
    begin_suppressed: tuple[int, ...]

    def __call__(
        self, prompt_ids: Sequence[int], output_ids: Sequence[int], logits: Tensor
    ) -> Tensor:
        """The row float32 [V] with what may not follow at minus infinity, in place."""
        del prompt_ids
        first = self.no_timestamps + 1
        logits[[*self.suppressed, self.no_timestamps]] = _NEVER
        if not output_ids and self.begin_suppressed:
            logits[list(self.begin_suppressed)] = _NEVER
        self._keep_pairs(output_ids, first, logits)
        if not output_ids:
            logits[:first] = _NEVER
            if self.max_initial is not None:
                logits[first + self.max_initial + 1 :] = _NEVER
        logprobs = logits.log_softmax(-1)
        if logprobs[first:].logsumexp(-1) > logprobs[:first].max():
            logits[:first] = _NEVER
        return logits

    def _keep_pairs(self, output_ids: Sequence[int], first: int, logits: Tensor) -> None:
        last_is_time = len(output_ids) >= 1 and output_ids[-1] >= first
        pair_is_whole = len(output_ids) < 2 or output_ids[-2] >= first
        if last_is_time and pair_is_whole:
            logits[first:] = _NEVER
        elif last_is_time:
            logits[: self.end] = _NEVER
        times = [token for token in output_ids if token >= first]
        if times:
            is_open = last_is_time and not pair_is_whole
            logits[first : times[-1] + (0 if is_open else 1)] = _NEVER


def timestamp_rules(directory: Path) -> dict[str, Callable[..., Tensor]]:
    """The rule of the model in `directory`, by name; empty if it tells no times."""
    path = directory / "generation_config.json"
    generation: dict[str, Any] = read_json(path) if path.is_file() else {}
    no_timestamps = generation.get("no_timestamps_token_id")
    end = generation.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if no_timestamps is None or not isinstance(end, int):
        return {}
    rule = TimestampRule(
        no_timestamps=no_timestamps,
        end=end,
        max_initial=generation.get("max_initial_timestamp_index"),
        suppressed=tuple(generation.get("suppress_tokens") or ()),
        begin_suppressed=tuple(generation.get("begin_suppress_tokens") or ()),
    )
    return {TIMESTAMP_RULE: rule}
