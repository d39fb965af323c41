"""When what was heard is not believed, and what is done then.

A window whose text repeats itself or is unlikely is heard again at a higher temperature; one that
is unlikely, and in which the model finds that nobody speaks, is silence.
Source: Radford et al. 2022, section 4.5, and `transcribe` of the program beside it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from quire.core.engine.audio import TranscriptionParams

Verdict = Literal["good", "again", "maybe_silence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What came of one window."""

    token_ids: list[int]
    logprobs: list[float]
    average_logprob: float = 0.0
    """Over the tokens and the one that ended them."""
    temperature: float = 0.0
    """At which it was heard."""


def compression_ratio(text: str) -> float:
    """How many times shorter a text becomes: high where it repeats itself."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw))


def verdict_of(heard: Heard, text: str, params: TranscriptionParams) -> Verdict:
    """Whether a window is believed; `maybe_silence`: nobody may speak in it, else it is `again`."""
    if not params.fallback_temperatures:
        return "good"
    if heard.average_logprob < params.logprob_threshold:
        return "maybe_silence"
    if compression_ratio(text) > params.compression_ratio_threshold:
        return "again"
    return "good"
