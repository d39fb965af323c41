"""What a worker remembers of one request."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quire.core.interface import Feature, NewRequest, SamplingSpec
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.penalties import SeenTokens

_MOST_BIAS = 1e30
"""A larger bias adds no certainty, and infinity would leave nothing finite to choose."""


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One request, from `NewRequest` until it is forgotten. Owned by the InputBatch."""

    request_id: str
    row: int
    """Its row in the batch's columns."""
    tokens: array[int]
    """Prompt and output. A sampled token stands as 0 until its step's result is read."""
    num_prompt_tokens: int
    sampling: SamplingSpec
    num_on_their_way: int = 0
    """How many of the last tokens were sampled by steps whose results have not been read."""
    seen: SeenTokens | None = None
    """For those with penalties."""
    bad_words: list[tuple[tuple[int, ...], array[int]]] = field(default_factory=list)
    """Each word, and its tokens but the last."""
    bias_ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """The tokens of `logit_bias`, each once."""
    bias: npt.NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    """What to add to each."""
    allowed_ids: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """`allowed_token_ids`, each once."""
    problem: str | None = None
    """Why it cannot be served; it runs with ids that are harmless until the engine drops it."""
    features: list[Feature] = field(default_factory=list)
    """What it brings besides tokens."""
    memo: dict[str, Any] = field(default_factory=dict)
    """What the model keeps for it: encoded images, positions."""
    prompt_ids: list[int] = field(default_factory=list)
    """The prompt as a list, for those with custom processors."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far, those on their way included."""
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_source_tokens(self) -> int:
        """Tokens that the model's encoder makes of what it brings."""
        return sum(feature.num_tokens for feature in self.features if feature.offset is None)

    @property
    def shown(self) -> list[Feature]:
        """Features that stand for tokens of its prompt."""
        return [f for f in self.features if f.offset is not None] if self.features else []

    def output_ids(self) -> list[int]:
        """The tokens of the output, as a new list."""
        return self.tokens[self.num_prompt_tokens :].tolist()

    def ends_with(self, prefix: array[int]) -> bool:
        """Whether the output ends with `prefix`; any output ends with the empty one."""
        if not prefix:
            return True
        return self.num_output_tokens >= len(prefix) and self.tokens[-len(prefix) :] == prefix


def make_request_state(
    new: NewRequest, *, row: int, vocab_size: int, processors: LogitsProcessors
) -> RequestState:
    """The state of a request that just came. What is wrong with it becomes its `problem`."""
    problems = list(_problems(new, vocab_size, processors))
    token_ids = new.token_ids
    if problems:
        token_ids = [token if 0 <= token < vocab_size else 0 for token in token_ids]
    sampling = new.sampling
    state = RequestState(
        request_id=new.request_id,
        row=row,
        tokens=array("i", token_ids),
        num_prompt_tokens=new.num_prompt_tokens,
        sampling=SamplingSpec() if problems else sampling,
        problem="; ".join(problems) or None,
        features=new.features,
    )
    if not problems:
        _prepare(state, token_ids[: new.num_prompt_tokens], token_ids[new.num_prompt_tokens :])
    return state


def _prepare(state: RequestState, prompt: list[int], output: list[int]) -> None:
    """Puts the settings that need it into the form that a step takes."""
    sampling = state.sampling
    state.bad_words = [(word, array("i", word[:-1])) for word in sampling.bad_words if word]
    if sampling.logit_bias:
        biases: dict[int, float] = {}
        for token, bias in sampling.logit_bias:
            biases[token] = min(biases.get(token, 0.0) + bias, _MOST_BIAS)
        state.bias_ids = np.array(list(biases), np.int64)
        state.bias = np.array(list(biases.values()), np.float32)
    if sampling.allowed_token_ids is not None:
        state.allowed_ids = np.unique(np.array(sampling.allowed_token_ids, np.int64))
    if sampling.has_penalties:
        state.seen = SeenTokens(prompt, output)
    if sampling.logits_processors:
        state.prompt_ids = prompt


def _problems(new: NewRequest, vocab_size: int, processors: LogitsProcessors) -> Iterator[str]:
    """Everything that would break the step for the others, were it let through."""
    sampling = new.sampling
    named = {
        "token_ids": new.token_ids,
        "allowed_token_ids": sampling.allowed_token_ids or (),
        "logit_bias": [token for token, _ in sampling.logit_bias],
        "bad_words": [token for word in sampling.bad_words for token in word],
        "min_tokens_forbids": sampling.min_tokens_forbids,
    }
    for name, ids in named.items():
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            stray = min(ids) if min(ids) < 0 else max(ids)
            yield f"{name} holds token {stray}; the vocabulary has ids 0 to {vocab_size - 1}"
    missing = processors.missing(sampling.logits_processors)
    if missing:
        yield f"no logits processor is registered as {', '.join(map(repr, missing))}"
