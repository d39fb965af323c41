"""transformers' own continuous batching, as a peer."""

from __future__ import annotations

import time
from typing import Any

from quire.benchmarks.workloads import Work


def even(works: list[Work], num_tokens: int) -> list[Work]:
    """The same prompts with outputs of one length, which that batching wants."""
    return [Work(work.prompt, num_tokens) for work in works]


def run_batched(model: Any, works: list[Work]) -> float:
    """Seconds for all requests, whose outputs are of one length, after a small batch as warm-up.

    `model` is one of transformers with the attention `sdpa` or another that pages.
    Raises: RuntimeError if tokens are missing.
    """
    from transformers import GenerationConfig

    settings = GenerationConfig(
        max_new_tokens=works[0].num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Not in inference mode: it belongs to a thread, and this batching has one of its own.
    model.generate_batch([work.prompt[:8] for work in works[:2]], generation_config=settings)
    begin = time.perf_counter()
    answers = model.generate_batch(
        [work.prompt for work in works], generation_config=settings, warmup=False
    )
    taken = time.perf_counter() - begin
    made = sum(len(answer.generated_tokens) for answer in answers.values())
    wanted = sum(work.num_tokens for work in works)
    if made != wanted:
        raise RuntimeError(f"{made} tokens came of {wanted}")
    return taken
