"""A device without compute: for measuring and testing everything above it. Imports no torch.

It answers a step at once, with tokens that depend on a request's length alone, so that output is
the same whatever the batch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.core.interface import (
    Backend,
    CacheGroup,
    CachePlan,
    Capabilities,
    CheckpointError,
    Device,
    DeviceInfo,
    MemoryInfo,
    ModelInfo,
    PositionLogprobs,
    Probe,
    Reason,
    StepBatch,
    StepResult,
    UnsupportedError,
    Worker,
    WorkerConfig,
)

if TYPE_CHECKING:
    from quire.core.interface import AttentionBackend, AttentionSpec, Ops

_GIB = 1 << 30
_INFO = DeviceInfo(index=0, name="no compute", architecture="null", total_memory_bytes=64 * _GIB)
_DTYPES = ("float32", "bfloat16", "float16")


class NullBackend(Backend):
    """Offers one device that computes nothing."""

    name = "null"
    interface_version = "1.1"

    def probe(self) -> Probe:
        return Probe(devices=(_INFO,), problem="computes nothing; for tests", priority=-100)

    def open(self, index: int) -> Device:
        return NullDevice()


class NullDevice(Device):
    """Takes any model and invents its tokens."""

    def __init__(self) -> None:
        self.info = _INFO
        self.capabilities = Capabilities(
            dtypes=_DTYPES,
            cache_dtypes=_DTYPES,
            block_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            attention_kinds=frozenset({"causal", "sliding_window"}),
            attention_features=frozenset({"soft_cap", "sinks", "alibi"}),
            determinism="invariant",
        )

    def memory(self) -> MemoryInfo:
        return MemoryInfo(total_bytes=64 * _GIB, free_bytes=64 * _GIB)

    def ops(self) -> Ops:
        raise UnsupportedError([_no_tensors("operators")], what="computing on the null device")

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        raise UnsupportedError([_no_tensors("attention")], what="computing on the null device")

    def make_worker(self, config: WorkerConfig) -> Worker:
        return NullWorker(config)


class NullWorker(Worker):
    """Answers token (length mod vocabulary) for a request that has `length` tokens."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._vocab_size = 1
        self._num_logprobs: dict[str, int | None] = {}

    def load_model(self) -> ModelInfo:
        settings = _read_config(Path(self._config.model))
        self._vocab_size = int(settings.get("vocab_size", 32000))
        return ModelInfo(
            architecture=str((settings.get("architectures") or ["unknown"])[0]),
            vocab_size=self._vocab_size,
            max_model_len=self._config.max_model_len,
            cache_groups=[self._cache_group(int(settings.get("num_hidden_layers", 1)))],
            num_parameters=0,
            weight_bytes=0,
            dtype=self._config.dtype,
            providers={"step": "null"},
        )

    def cache_budget_bytes(self) -> int:
        return self._config.cache_memory_bytes or 4 * _GIB

    def allocate_cache(self, plan: CachePlan) -> None:
        return None

    def execute(self, batch: StepBatch) -> StepResult:
        vocab_size = self._vocab_size
        nothing: list[int] = []
        columns = zip(batch.samples, batch.num_computed_tokens, batch.num_new_tokens, strict=True)
        tokens = [
            [(computed + new) % vocab_size] if samples else nothing
            for samples, computed, new in columns
        ]
        self._remember(batch)
        logprobs = self._logprobs(batch, tokens) if self._num_logprobs else None
        return StepResult(step_id=batch.step_id, sampled_token_ids=tokens, logprobs=logprobs)

    def close(self) -> None:
        return None

    def _cache_group(self, num_layers: int) -> CacheGroup:
        block_size = self._config.block_size
        return CacheGroup(
            name="full",
            kind="causal",
            window=None,
            block_size=block_size,
            num_layers=num_layers,
            bytes_per_block=block_size * num_layers * 64,
        )

    def _remember(self, batch: StepBatch) -> None:
        """Keeps who asked for log-probabilities; an idle dict costs the others nothing."""
        for request_id in batch.finished_request_ids:
            self._num_logprobs.pop(request_id, None)
        for request in batch.new_requests:
            if request.sampling.num_logprobs is not None:
                self._num_logprobs[request.request_id] = request.sampling.num_logprobs

    def _logprobs(
        self, batch: StepBatch, tokens: list[list[int]]
    ) -> list[list[PositionLogprobs] | None]:
        return [
            [_certain(token, self._num_logprobs[request_id]) for token in sampled]
            if request_id in self._num_logprobs
            else None
            for request_id, sampled in zip(batch.request_ids, tokens, strict=True)
        ]


def _certain(token_id: int, num_top: int | None) -> PositionLogprobs:
    shown = 1 if num_top else 0
    return PositionLogprobs(
        token_id=token_id,
        logprob=0.0,
        rank=1,
        top_ids=[token_id] * shown,
        top_logprobs=[0.0] * shown,
    )


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; give a model directory") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path} holds no object; give a model directory")
    return settings


def _no_tensors(what: str) -> Reason:
    return Reason(code="null.compute", need=what, have="no tensors", remedy="use another device")
