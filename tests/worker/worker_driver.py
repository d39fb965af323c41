"""Plays the engine for a worker: hands out blocks, cuts prompts into chunks, preempts when told to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quire.backends.reference import TorchDevice
from quire.core.interface import (
    CachePlan,
    Capabilities,
    Device,
    DeviceInfo,
    NewRequest,
    PendingStep,
    PositionLogprobs,
    SamplingSpec,
    StepBatch,
    StepResult,
    WorkerConfig,
)
from quire.core.worker.worker import DefaultWorker

GREEDY = SamplingSpec(temperature=0.0)
BLOCK_SIZE = 8


def make_device(**claims: object) -> TorchDevice:
    """The reference on host memory, with `claims` on top of the conservative defaults."""
    settings = {
        "copy_mode": "unified",
        "attention_kinds": frozenset({"causal", "sliding_window"}),
        "attention_features": frozenset({"soft_cap"}),
    }
    capabilities = Capabilities(**{**settings, **claims})
    return TorchDevice(info=DeviceInfo(index=0, name="host"), capabilities=capabilities)


def make_config(directory: Path, **changes: object) -> WorkerConfig:
    """A complete config for a tiny model."""
    settings = {
        "model": str(directory),
        "dtype": "float32",
        "cache_dtype": "float32",
        "block_size": BLOCK_SIZE,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "device_memory_fraction": 0.5,
    }
    return WorkerConfig(**{**settings, **changes})


def make_worker(
    directory: Path, *, device: Device | None = None, num_blocks: int = 160, **changes: object
) -> DefaultWorker:
    """A worker that is ready for steps; its cache holds NaN wherever nothing was written."""
    worker = DefaultWorker(device or make_device(), make_config(directory, **changes))
    info = worker.load_model()
    worker.allocate_cache(CachePlan(num_blocks=[num_blocks] * len(info.cache_groups)))
    for cache in worker._caches:
        for tensor in cache.tensors.values():
            tensor.fill_(float("nan"))
    return worker


@dataclass
class Job:
    """One request as the driver sees it."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: SamplingSpec = GREEDY
    output: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    error: str | None = None
    num_computed: int = 0
    num_on_their_way: int = 0
    blocks: list[list[int]] | None = None
    """For each cache group; None: the worker does not know the request."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output) + self.num_on_their_way

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.output) >= self.max_tokens

    @property
    def may_run(self) -> bool:
        wants = len(self.output) + self.num_on_their_way < self.max_tokens
        return self.error is None and wants and self.num_computed < self.num_tokens


class Driver:
    """Schedules jobs on one worker."""

    def __init__(
        self, worker: DefaultWorker, *, num_blocks: int = 160, num_groups: int = 1
    ) -> None:
        self.worker = worker
        self.jobs: dict[str, Job] = {}
        self.results: list[StepResult] = []
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        self._free = [order.tolist() for _ in range(num_groups)]
        self._finished: list[str] = []
        self._step_id = 0

    def add(
        self, request_id: str, prompt: Sequence[int], max_tokens: int = 8, sampling=GREEDY
    ) -> Job:
        """A new job."""
        job = Job(request_id, list(prompt), max_tokens, sampling)
        self.jobs[request_id] = job
        return job

    def preempt(self, job: Job) -> None:
        """Takes a job's blocks; it goes on later, from its tokens."""
        assert job.num_on_their_way == 0
        self._drop(job)
        job.num_computed = 0

    def make_batch(self, work: Mapping[str, int]) -> StepBatch:
        """A step that computes so many tokens of each of these jobs."""
        self._step_id += 1
        new_requests, new_blocks = [], []
        for request_id, count in work.items():
            job = self.jobs[request_id]
            is_new = job.blocks is None
            if is_new:
                job.blocks = [[] for _ in self._free]
            blocks = self._grow(job, job.num_computed + count)
            if is_new:
                new_requests.append(self._new_request(job))
            new_blocks.append(blocks if any(blocks) and not is_new else None)
        jobs = [self.jobs[request_id] for request_id in work]
        batch = StepBatch(
            step_id=self._step_id,
            finished_request_ids=self._finished,
            new_requests=new_requests,
            request_ids=list(work),
            num_new_tokens=list(work.values()),
            num_computed_tokens=[job.num_computed for job in jobs],
            new_block_ids=new_blocks,
            samples=[
                job.num_computed + count == job.num_tokens
                for job, count in zip(jobs, work.values(), strict=True)
            ],
        )
        self._finished = []
        for job, count, samples in zip(jobs, work.values(), batch.samples, strict=True):
            job.num_computed += count
            job.num_on_their_way += samples
        return batch

    def receive(self, batch: StepBatch, result: StepResult) -> None:
        """Writes a result into the jobs; gives back the blocks of those that are done."""
        self.results.append(result)
        assert result.step_id == batch.step_id
        for index, request_id in enumerate(batch.request_ids):
            job = self.jobs[request_id]
            job.num_on_their_way -= batch.samples[index]
            if request_id in result.errors:
                job.error = result.errors[request_id]
                assert result.sampled_token_ids[index] == []
            elif batch.samples[index]:
                (token,) = result.sampled_token_ids[index]
                job.output.append(token)
                if result.logprobs is not None:
                    job.logprobs += result.logprobs[index] or []
            job.prompt_logprobs += result.prompt_logprobs.get(request_id, [])
            if job.is_done and job.num_on_their_way == 0 and job.blocks is not None:
                self._drop(job)

    def step(self, work: Mapping[str, int]) -> StepResult:
        """One step, waited for."""
        batch = self.make_batch(work)
        result = self.worker.execute(batch)
        self.receive(batch, result)
        return result

    def plan_step(self, chunk: int = 64) -> dict[str, int]:
        """Everything that can run, in chunks."""
        return {
            name: min(chunk, job.num_tokens - job.num_computed)
            for name, job in self.jobs.items()
            if job.may_run
        }

    def run(self, chunk: int = 64) -> dict[str, list[int]]:
        """Runs all jobs to their end; their outputs."""
        while work := self.plan_step(chunk):
            self.step(work)
            self.worker._running().requests.check_integrity()
        return {name: job.output for name, job in self.jobs.items()}

    def run_overlapped(self, chunk: int = 64) -> dict[str, list[int]]:
        """Runs all jobs with the next step submitted before the result of the last one is read."""
        in_flight: list[tuple[StepBatch, PendingStep]] = []
        while True:
            work = self.plan_step(chunk)
            if work:
                batch = self.make_batch(work)
                in_flight.append((batch, self.worker.submit(batch)))
            if not in_flight:
                return {name: job.output for name, job in self.jobs.items()}
            if len(in_flight) > 1 or not work:
                batch, pending = in_flight.pop(0)
                self.receive(batch, pending.result())
                self.worker._running().requests.check_integrity()

    def _new_request(self, job: Job) -> NewRequest:
        return NewRequest(
            request_id=job.request_id,
            token_ids=job.prompt + job.output,
            num_prompt_tokens=len(job.prompt),
            num_computed_tokens=job.num_computed,
            block_ids=[list(blocks) for blocks in job.blocks or []],
            sampling=job.sampling,
        )

    def _grow(self, job: Job, num_tokens: int) -> list[list[int]]:
        new = []
        for free, blocks in zip(self._free, job.blocks or [], strict=True):
            missing = -(-num_tokens // BLOCK_SIZE) - len(blocks)
            taken = [free.pop() for _ in range(missing)]
            blocks.extend(taken)
            new.append(taken)
        return new

    def _drop(self, job: Job) -> None:
        for free, blocks in zip(self._free, job.blocks or [], strict=True):
            free.extend(blocks)
        job.blocks = None
        self._finished.append(job.request_id)
