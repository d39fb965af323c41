"""A worker without tensors that checks what it is told, and fails when asked to. Used by every test of the engine.

It lives in a module of its own, so that a spawned engine process can import it by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quire.core.config import EngineConfig
from quire.core.engine.core import EngineCore, make_core
from quire.core.engine.facts import EngineFacts
from quire.core.errors import (
    ConfigError,
    DeviceLost,
    DeviceOutOfMemory,
    Reason,
    UnsupportedError,
)
from quire.core.executor.in_process import InProcessExecutor
from quire.core.interface.worker import (
    CacheGroup,
    CachePlan,
    ModelInfo,
    PendingStep,
    PositionLogprobs,
    SamplingSpec,
    StepBatch,
    StepResult,
    Worker,
)
from quire.core.scheduler.request import RequestSpec

VOCAB_SIZE = 512
MAX_MODEL_LEN = 256


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """The fake model: a token that depends on everything before it. Never below 4, where tiny tokenizers have specials."""
    mixed = seed * 31 + len(token_ids) * 7
    for token_id in token_ids:
        mixed = (mixed * 131 + token_id) % 1_000_003
    return 4 + mixed % (VOCAB_SIZE - 4)


def expected_tokens(prompt: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """What the fake model answers to a prompt, one token at a time and alone."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(next_token(token_ids, seed))
    return token_ids[len(prompt) :]


@dataclass
class FakeRequest:
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingSpec


class FakeWorker(Worker):
    """Remembers requests as a real worker does. `before_step` and `before_submit` may raise."""

    def __init__(
        self,
        *,
        before_step: Callable[[StepBatch], None] = lambda batch: None,
        before_submit: Callable[[StepBatch], None] = lambda batch: None,
        is_asynchronous: bool = False,
    ) -> None:
        self.before_step = before_step
        self.before_submit = before_submit
        self.is_asynchronous = is_asynchronous
        self.requests: dict[str, FakeRequest] = {}
        self.pending: list[FakePending] = []
        self.log: list[str] = []

    def load_model(self) -> ModelInfo:
        self.log.append("load")
        return model_info()

    def cache_budget_bytes(self) -> int:
        return 1 << 20

    def allocate_cache(self, plan: CachePlan) -> None:
        self.log.append("allocate")

    def warm_up(self) -> None:
        self.log.append("warm_up")

    def execute(self, batch: StepBatch) -> StepResult:
        return self.submit(batch).result()

    def submit(self, batch: StepBatch) -> PendingStep:
        self.log.append(f"submit {batch.step_id}")
        self.before_submit(batch)
        pending = FakePending(self, batch)
        self.pending.append(pending)
        if not self.is_asynchronous:
            pending.result()
        return pending

    def close(self) -> None:
        self.log.append("close")

    def _take_in(self, batch: StepBatch) -> None:
        for request_id in batch.finished_request_ids:
            self.requests.pop(request_id, None)
        for new in batch.new_requests:
            assert new.request_id not in self.requests, f"{new.request_id} comes as new twice"
            self.requests[new.request_id] = FakeRequest(
                list(new.token_ids), new.num_prompt_tokens, new.sampling
            )
        assert len(set(batch.request_ids)) == len(batch.request_ids), batch.request_ids
        assert all(one in self.requests for one in batch.request_ids), batch.request_ids

    def _run(self, batch: StepBatch) -> StepResult:
        tokens: list[list[int]] = []
        logprobs: list[list[PositionLogprobs] | None] = []
        columns = zip(
            batch.request_ids,
            batch.num_computed_tokens,
            batch.num_new_tokens,
            batch.samples,
            strict=True,
        )
        for request_id, computed, new, samples in columns:
            request = self.requests[request_id]
            assert computed + new <= len(request.token_ids), (request_id, computed, new)
            assert samples == (computed + new == len(request.token_ids)), (request_id, samples)
            sampled = [next_token(request.token_ids, request.sampling.seed)] if samples else []
            request.token_ids += sampled
            tokens.append(sampled)
            wanted = request.sampling.num_logprobs
            logprobs.append(
                [fake_logprobs(one, wanted) for one in sampled] if wanted is not None else None
            )
        return StepResult(
            step_id=batch.step_id,
            sampled_token_ids=tokens,
            logprobs=logprobs if any(logprobs) else None,
        )


class FakePending(PendingStep):
    """Happens when its result is asked for. After a step that failed, those submitted behind it bring rubbish."""

    def __init__(self, worker: FakeWorker, batch: StepBatch) -> None:
        self._worker, self._batch = worker, batch
        self._result: StepResult | None = None
        self.is_void = False

    def result(self) -> StepResult:
        if self._result is None:
            self._result = self._happen()
        return self._result

    def _happen(self) -> StepResult:
        worker, batch = self._worker, self._batch
        assert worker.pending.pop(0) is self, "results are asked for out of order"
        worker.log.append(f"wait {batch.step_id}")
        worker._take_in(batch)
        if self.is_void:
            return StepResult(step_id=batch.step_id, sampled_token_ids=[[1]] * len(batch.samples))
        try:
            worker.before_step(batch)
        except Exception:
            for later in worker.pending:
                later.is_void = True
            raise
        return worker._run(batch)


def fake_logprobs(token_id: int, count: int) -> PositionLogprobs:
    """The chosen token second, so that ranks and order can be told apart."""
    others = [(token_id + 1) % VOCAB_SIZE, token_id, *range(count)][:count]
    return PositionLogprobs(
        token_id=token_id,
        logprob=-1.0,
        rank=2,
        top_ids=others,
        top_logprobs=[-0.5 * (place + 1) for place in range(len(others))],
    )


def model_info() -> ModelInfo:
    """One cache group of blocks of four tokens."""
    group = CacheGroup(
        name="full", kind="causal", window=None, block_size=4, num_layers=1, bytes_per_block=64
    )
    return ModelInfo(
        architecture="Fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        cache_groups=[group],
        num_parameters=0,
        weight_bytes=0,
        dtype="float32",
    )


def make_facts(config: EngineConfig, num_blocks: int) -> EngineFacts:
    return EngineFacts(
        model=config.model,
        served_model_name=config.served_model_name or config.model,
        model_directory=config.model,
        architecture="Fake",
        vocab_size=VOCAB_SIZE,
        max_model_len=config.max_model_len or MAX_MODEL_LEN,
        num_parameters=0,
        weight_bytes=0,
        dtype="float32",
        device="fake",
        device_name="a fake",
        num_blocks=[num_blocks],
        num_cache_tokens=4 * (num_blocks - 1),
        providers={},
        changes=[],
        startup_s={"load": 0.0},
    )


def make_fake_core(
    worker: FakeWorker | None = None, *, num_blocks: int = 512, **settings: Any
) -> EngineCore:
    """A core on a fake worker; `settings` are those of EngineConfig."""
    settings.setdefault("model", "fake-model")
    config = EngineConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 32, **settings})
    worker = worker or FakeWorker(is_asynchronous=bool(config.overlap_scheduling))
    return make_core(
        config,
        make_facts(config, num_blocks),
        model_info(),
        CachePlan(num_blocks=[num_blocks]),
        InProcessExecutor(worker),
    )


def build_fake_core(config: EngineConfig) -> EngineCore:
    """For an engine process. `options` say what is to go wrong.

    `fake.start`; `fake.step`, at step `fake.at` or in the first step with `fake.running` requests;
    `fake.pause_s` passes before each step.
    """
    fault = config.options.get("fake.start")
    if fault is not None:
        raise START_FAULTS[fault]
    step_fault, at = config.options.get("fake.step"), int(config.options.get("fake.at", "3"))
    running = int(config.options.get("fake.running", "0"))
    pause_s = float(config.options.get("fake.pause_s", "0"))

    def before_step(batch: StepBatch) -> None:
        if pause_s:
            _pause(pause_s)
        is_time = len(batch.request_ids) >= running if running else batch.step_id == at
        if step_fault is not None and is_time:
            _fail(step_fault)

    worker = FakeWorker(before_step=before_step, is_asynchronous=bool(config.overlap_scheduling))
    return make_core(
        config,
        make_facts(config, 512),
        model_info(),
        CachePlan(num_blocks=[512]),
        InProcessExecutor(worker),
    )


START_FAULTS: dict[str, BaseException] = {
    "config": ConfigError("nothing fits"),
    "unsupported": UnsupportedError(
        [
            Reason(code="a.b", need="x", have="y", remedy="z"),
            Reason(code="c.d", need="1", have="2", remedy="3"),
        ],
        what="this model",
    ),
    "bug": ZeroDivisionError("a bug of ours"),
}


def _pause(seconds: float) -> None:
    import time

    time.sleep(seconds)  # a step of a device takes time; tests wait for its results, not for this


def _fail(fault: str) -> None:
    match fault:
        case "exit":
            os._exit(7)
        case "hang":
            _pause(600.0)
        case "oom":
            raise DeviceOutOfMemory("no room for a tensor", requested_bytes=10)
        case "lost":
            raise DeviceLost("the device fell off the bus")
        case "bug":
            raise ZeroDivisionError("a bug of the worker")


def spec(request_id: str, prompt: Sequence[int], max_tokens: int = 8, **fields: Any) -> RequestSpec:
    """A request as the front would hand it over."""
    sampling = fields.pop("sampling", SamplingSpec(temperature=0.0))
    return RequestSpec(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=sampling,
        max_tokens=max_tokens,
        **fields,
    )
