"""What `LLM.embed`, `classify`, `score`, `reward` and `encode` return, by the names of vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingData:
    """Numbers as they are."""

    data: list[float] | list[list[float]]
    """A vector, or a row for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """A vector."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """One number for each label."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well two texts go together."""

    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledRequest(Generic[T]):
    """One text and what came of it."""

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    finished: bool = True
