"""How much memory the cache may take: what is free, less the weights and the largest step."""

from __future__ import annotations

from quire.core.interface import NewRequest, SamplingSpec, StepBatch, WorkerConfig
from quire.core.models.description import ModelDescription
from quire.core.models.language_model import LanguageModel
from quire.core.models.pooling.model import PoolingModel

_LARGEST_SAMPLING = SamplingSpec(
    temperature=1.0, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, num_logprobs=20
)
"""Sampling that needs the most memory."""
_SAMPLING_BYTES = 48
"""For each logit, at the peak of filtering in plain torch: probabilities, their order and sums."""
_FLOAT_BYTES = 4


def make_dummy_batch(
    config: WorkerConfig,
    *,
    num_tokens: int,
    num_requests: int,
    num_groups: int,
    sampling: SamplingSpec = _LARGEST_SAMPLING,
) -> StepBatch:
    """A step of new requests that compute `num_tokens` and sample, all of it in NULL_BLOCK."""
    num_requests = min(num_requests, num_tokens)
    share, more = divmod(num_tokens, num_requests)
    lengths = [min(share + (index < more), config.max_model_len) for index in range(num_requests)]
    new_requests = [
        NewRequest(
            request_id=f"dummy-{index}",
            token_ids=[0] * length,
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=[[] for _ in range(num_groups)],
            sampling=sampling,
        )
        for index, length in enumerate(lengths)
    ]
    return StepBatch(
        step_id=0,
        finished_request_ids=[],
        new_requests=new_requests,
        request_ids=[new.request_id for new in new_requests],
        num_new_tokens=lengths,
        num_computed_tokens=[0] * num_requests,
        new_block_ids=[None] * num_requests,
        samples=[True] * num_requests,
    )


def estimate_step_bytes(model: ModelDescription, config: WorkerConfig) -> int:
    """The peak of the largest step, from shapes: for memory whose use cannot be measured exactly.

    All in float32, as an upper bound.
    """
    row = model.row_elements * _FLOAT_BYTES
    logits = config.max_num_seqs * model.vocab_size * _SAMPLING_BYTES
    return config.max_num_batched_tokens * row + logits


def cache_bytes_per_block(model: LanguageModel | PoolingModel) -> list[int]:
    """Bytes of one block of each cache group, all its layers together."""
    return [
        backend.cache_layout().bytes_per_block * len(group.layers)
        for group, backend in zip(model.attention_groups, model.attention_backends, strict=True)
    ]
