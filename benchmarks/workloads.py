"""The loads that every comparison runs: prompts as token ids, and how many tokens each asks for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Work:
    """One request of a load."""

    prompt: list[int]
    num_tokens: int


def single_stream(rng: np.random.Generator, vocab_size: int) -> list[Work]:
    """One request: 64 tokens in, 64 out."""
    return [Work(_tokens(rng, vocab_size, 64), 64)]


def mixed(rng: np.random.Generator, vocab_size: int, *, num_requests: int = 32) -> list[Work]:
    """Prompts of 32-256 tokens, outputs of 32-192."""
    prompts = np.random.default_rng(1).integers(32, 257, size=num_requests)
    outputs = np.random.default_rng(2).integers(32, 193, size=num_requests)
    return [
        Work(_tokens(rng, vocab_size, int(length)), int(count))
        for length, count in zip(prompts, outputs, strict=True)
    ]


def long_prefill(rng: np.random.Generator, vocab_size: int) -> list[Work]:
    """One prompt of 2048 tokens, one token out."""
    return [Work(_tokens(rng, vocab_size, 2048), 1)]


def shared_prefix(rng: np.random.Generator, vocab_size: int) -> list[Work]:
    """32 requests that begin with the same 512 tokens and go on with 32 of their own; 16 out."""
    prefix = _tokens(rng, vocab_size, 512)
    return [Work(prefix + _tokens(rng, vocab_size, 32), 16) for _ in range(32)]


def sample_of(load: list[Work], count: int) -> list[Work]:
    """Every n-th request of a load, `count` of them, so that a slow peer needs not run all."""
    stride = max(len(load) // count, 1)
    return load[::stride][:count]


def _tokens(rng: np.random.Generator, vocab_size: int, length: int) -> list[int]:
    return [int(token) for token in rng.integers(10, vocab_size - 1000, size=length)]
