"""Log-probabilities in the shapes of the two completion endpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quire.core.outputs import Logprob, TokenLogprobs
from quire.core.serving.answers.token_bytes import TokenBytes
from quire.core.serving.protocol.chat import ChatLogprobs, ChatTokenLogprob, ChatTopLogprob
from quire.core.serving.protocol.completions import CompletionLogprobs, PromptLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written."""

    as_ids: bool
    """As `token_id:123`, since several tokens may read the same."""

    def of(self, token_id: int, entry: Logprob) -> str:
        """The token's name."""
        if self.as_ids or entry.decoded_token is None:
            return f"token_id:{token_id}"
        return entry.decoded_token


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs | None],
    *,
    num_top: int,
    text_offset: int,
    names: TokenNames,
    first_text: str = "",
) -> CompletionLogprobs:
    """Columns for `token_ids`; the first position is None if nothing predicts the token.

    `text_offset` is where the first token begins in the choice's text; negative if the text lacks
    it. `first_text` is what that token reads, where no position says so.
    """
    columns = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for token_id, position in zip(token_ids, positions, strict=True):
        entry = Logprob(0.0, decoded_token=first_text) if position is None else position[token_id]
        columns.text_offset.append(max(text_offset, 0))
        columns.tokens.append(names.of(token_id, entry))
        columns.token_logprobs.append(None if position is None else finite(entry.logprob))
        columns.top_logprobs.append(_top_by_name(token_id, position, num_top, names))
        text_offset += len(entry.decoded_token or "")
    return columns


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[TokenLogprobs],
    *,
    num_top: int,
    names: TokenNames,
    token_bytes: TokenBytes,
) -> ChatLogprobs:
    """One entry for each of `token_ids`, with its `num_top` most likely rivals."""

    def record(token_id: int, entry: Logprob) -> dict[str, Any]:
        name = names.of(token_id, entry)
        bytes_ = token_bytes.of(token_id, entry, name)
        return {"token": name, "logprob": finite(entry.logprob), "bytes": bytes_}

    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        top = [ChatTopLogprob(**record(i, e)) for i, e in _most_likely(position, num_top)]
        chosen = record(token_id, position[token_id])
        content.append(ChatTokenLogprob(**chosen, top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def prompt_logprobs_body(positions: Sequence[TokenLogprobs | None]) -> PromptLogprobs:
    """As vLLM writes them: by token id, everything that is known."""
    return [
        None if position is None else {str(i): _as_record(e) for i, e in position.items()}
        for position in positions
    ]


def finite(logprob: float) -> float:
    """The number, or the lowest that is written."""
    return logprob if math.isfinite(logprob) else LOWEST


def _top_by_name(
    token_id: int, position: TokenLogprobs | None, num_top: int, names: TokenNames
) -> dict[str, float] | None:
    """The most likely ones, and the chosen one even if it is not among them."""
    if position is None:
        return None
    entries = dict(_most_likely(position, num_top))
    entries.setdefault(token_id, position[token_id])
    top: dict[str, float] = {}
    for other_id, entry in entries.items():
        # Of tokens that read the same the likelier one is told.
        top.setdefault(names.of(other_id, entry), finite(entry.logprob))
    return top


def _most_likely(position: TokenLogprobs, num_top: int) -> Iterator[tuple[int, Logprob]]:
    ranked = sorted(position.items(), key=lambda item: -finite(item[1].logprob))
    yield from ranked[:num_top]


def _as_record(entry: Logprob) -> dict[str, Any]:
    return {
        "logprob": finite(entry.logprob),
        "rank": entry.rank,
        "decoded_token": entry.decoded_token,
    }
