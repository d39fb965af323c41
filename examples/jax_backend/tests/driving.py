"""Plays the engine for a worker on a model made up from a seed; no checkpoint is needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quire_jax import JaxBackend

from quire.core.interface import (
    CachePlan,
    NewRequest,
    SamplingSpec,
    StepBatch,
    StepResult,
    Worker,
    WorkerConfig,
)

GREEDY = SamplingSpec(temperature=0.0)
VOCAB_SIZE = 96
_CONFIG = {
    "architectures": ["Gemma2ForCausalLM"],  # the most features: two groups, soft caps
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 20,
    "max_position_embeddings": 256,
}
NUM_GROUPS = 2
NUM_BLOCKS = 12


def make_worker(directory: Path, **changes: Any) -> Worker:
    """A worker that is ready for steps."""
    (directory / "config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
    settings: dict[str, Any] = {
        "model": str(directory),
        "dtype": "float32",
        "cache_dtype": "float32",
        "block_size": 16,
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "device_memory_fraction": 0.5,
        "load_format": "dummy",
    }
    worker = JaxBackend().open(0).make_worker(WorkerConfig(**settings | changes))
    assert worker is not None
    worker.load_model()
    worker.allocate_cache(CachePlan(num_blocks=[NUM_BLOCKS] * NUM_GROUPS))
    return worker


def make_batch(
    step_id: int,
    prompts: dict[str, Sequence[int]],
    sampling: SamplingSpec | dict[str, SamplingSpec] = GREEDY,
    **changes: Any,
) -> StepBatch:
    """A step that computes whole prompts; request i has blocks 1 + 3i to 3 + 3i of each group."""
    new = [
        NewRequest(
            request_id=name,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            num_computed_tokens=0,
            block_ids=[list(range(1 + 3 * number, 4 + 3 * number))] * NUM_GROUPS,
            sampling=sampling[name] if isinstance(sampling, dict) else sampling,
        )
        for number, (name, prompt) in enumerate(prompts.items())
    ]
    columns: dict[str, Any] = {
        "step_id": step_id,
        "finished_request_ids": [],
        "new_requests": new,
        "request_ids": list(prompts),
        "num_new_tokens": [len(prompt) for prompt in prompts.values()],
        "num_computed_tokens": [0] * len(new),
        "new_block_ids": [None] * len(new),
        "samples": [True] * len(new),
    }
    return StepBatch(**columns | changes)


def decode(worker: Worker, step_id: int, name: str, num_computed: int) -> StepResult:
    """One more token of a request that the worker knows."""
    return worker.execute(
        StepBatch(
            step_id=step_id,
            finished_request_ids=[],
            new_requests=[],
            request_ids=[name],
            num_new_tokens=[1],
            num_computed_tokens=[num_computed],
            new_block_ids=[None],
            samples=[True],
        )
    )
