"""Plays the engine for a worker: hands out blocks, cuts prompts, preempts. Public methods alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from quire.conformance.trial import Finding
from quire.core.interface import (
    NewRequest,
    PositionLogprobs,
    SamplingSpec,
    StepBatch,
    StepResult,
    Worker,
)

GREEDY = SamplingSpec(temperature=0.0)


@dataclass(slots=True, kw_only=True)
class Job:
    """One request as the suite sees it."""

    request_id: str
    prompt: list[int]
    max_tokens: int
    sampling: SamplingSpec = GREEDY
    output: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    num_computed: int = 0
    num_on_their_way: int = 0
    blocks: list[list[int]] | None = None
    """For each cache group; None: the worker does not know the request."""
    shared: list[list[int]] = field(default_factory=list)
    """Blocks of another request that this one begins with; they are not its own."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output, the tokens on their way included."""
        return len(self.prompt) + len(self.output) + self.num_on_their_way

    @property
    def is_runnable(self) -> bool:
        """Whether a step can compute something of it."""
        is_wanted = len(self.output) + self.num_on_their_way < self.max_tokens
        return is_wanted and self.num_computed < self.num_tokens


class Steps:
    """Runs jobs on one worker."""

    def __init__(
        self,
        worker: Worker,
        *,
        block_size: int,
        num_blocks: int,
        num_groups: int,
        max_tokens: int,
        max_requests: int,
        rng: np.random.Generator,
    ) -> None:
        self.worker = worker
        self.jobs: dict[str, Job] = {}
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._max_requests = max_requests
        order = [int(block) for block in rng.permutation(np.arange(1, num_blocks))]
        self._free = [list(order) for _ in range(num_groups)]
        self._finished: list[str] = []
        self._step_id = 0

    @property
    def num_steps(self) -> int:
        """Steps so far."""
        return self._step_id

    def add(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingSpec = GREEDY,
    ) -> Job:
        """A new job."""
        job = Job(
            request_id=request_id, prompt=list(prompt), max_tokens=max_tokens, sampling=sampling
        )
        self.jobs[request_id] = job
        return job

    def reuse_prefix(self, job: Job, other: Job, num_blocks: int) -> None:
        """Lets a new job begin with the first blocks of another, as after a prefix hit."""
        assert job.blocks is None, job
        assert other.blocks is not None, other
        job.shared = [blocks[:num_blocks] for blocks in other.blocks]
        job.num_computed = num_blocks * self._block_size

    def preempt(self, job: Job) -> None:
        """Takes a job's blocks; it goes on later, from its tokens."""
        self._drop(job)
        job.num_computed, job.shared = 0, []

    def plan(self, chunk: int) -> dict[str, int]:
        """What can run now, at most `chunk` tokens of each, within the step's limits."""
        work: dict[str, int] = {}
        left = self._max_tokens
        for name, job in self.jobs.items():
            if job.is_runnable and left and len(work) < self._max_requests:
                work[name] = min(chunk, left, job.num_tokens - job.num_computed)
                left -= work[name]
        return work

    def batch(
        self, work: Mapping[str, int], guesses: Mapping[str, list[int]] | None = None
    ) -> StepBatch:
        """The step that computes so many tokens of each job; they count as computed from now.

        `guesses`: what may follow the last token of some of them; computed as well.
        """
        guesses = guesses or {}
        self._step_id += 1
        new_requests: list[NewRequest] = []
        new_blocks: list[list[list[int]] | None] = []
        for name, count in work.items():
            job = self.jobs[name]
            is_new = job.blocks is None
            taken = self._grow(job, job.num_computed + count + len(guesses.get(name, ())))
            new_blocks.append(taken if any(taken) and not is_new else None)
            new_requests += [_new_request(job)] if is_new else []
        jobs = [self.jobs[name] for name in work]
        counts = list(work.values())
        before = [job.num_computed for job in jobs]
        samples = []
        for job, count in zip(jobs, counts, strict=True):
            job.num_computed += count
            samples.append(job.num_computed == job.num_tokens)
            job.num_on_their_way += samples[-1]
        finished, self._finished = self._finished, []
        return StepBatch(
            step_id=self._step_id,
            finished_request_ids=finished,
            new_requests=new_requests,
            request_ids=list(work),
            num_new_tokens=[count + len(guesses.get(name, ())) for name, count in work.items()],
            num_computed_tokens=before,
            new_block_ids=new_blocks,
            samples=samples,
            draft_token_ids=dict(guesses),
        )

    def receive(self, batch: StepBatch, result: StepResult) -> None:
        """Writes a result into the jobs; gives back the blocks of those that are done."""
        _check_result(batch, result)
        for index, name in enumerate(batch.request_ids):
            job = self.jobs[name]
            job.num_on_their_way -= batch.samples[index]
            tokens = result.sampled_token_ids[index]
            job.output += tokens
            # A guess that was right has been computed.
            job.num_computed += max(0, len(tokens) - 1)
            job.prompt_logprobs += result.prompt_logprobs.get(name, [])
            if result.logprobs is not None:
                job.logprobs += result.logprobs[index] or []
            if len(job.output) >= job.max_tokens and not job.num_on_their_way:
                self._drop(job)

    def run(self, chunk: int = 64, *, max_steps: int = 100_000) -> dict[str, list[int]]:
        """Runs all jobs to their end, or so many steps; their outputs."""
        while max_steps and (work := self.plan(chunk)):
            batch = self.batch(work)
            self.receive(batch, self.worker.execute(batch))
            max_steps -= 1
        return {name: job.output for name, job in self.jobs.items()}

    def run_guessing(
        self, guess: Callable[[Job], list[int]], chunk: int = 64
    ) -> dict[str, list[int]]:
        """The same with guesses after the last token of every job that decodes."""
        while work := self.plan(chunk):
            guesses: dict[str, list[int]] = {}
            left = self._max_tokens - sum(work.values())
            for name, count in work.items():
                job = self.jobs[name]
                is_decoding = job.output and job.num_computed + count == job.num_tokens
                room = min(left, job.max_tokens - len(job.output) - 1)
                if is_decoding and room > 0:
                    guesses[name] = guess(job)[:room]
                    left -= len(guesses[name])
            batch = self.batch(work, guesses)
            self.receive(batch, self.worker.execute(batch))
        return {name: job.output for name, job in self.jobs.items()}

    def run_overlapped(self, chunk: int = 64) -> dict[str, list[int]]:
        """The same, each step submitted before the result of the last one is read."""
        waiting = []
        while True:
            if work := self.plan(chunk):
                batch = self.batch(work)
                waiting.append((batch, self.worker.submit(batch)))
            if not waiting:
                return {name: job.output for name, job in self.jobs.items()}
            if len(waiting) > 1 or not work:
                batch, pending = waiting.pop(0)
                self.receive(batch, pending.result())

    def _grow(self, job: Job, num_tokens: int) -> list[list[int]]:
        if job.blocks is None:
            job.blocks = [list(part) for part in job.shared] or [[] for _ in self._free]
        taken = []
        for free, blocks in zip(self._free, job.blocks, strict=True):
            missing = -(-num_tokens // self._block_size) - len(blocks)
            taken.append([free.pop() for _ in range(missing)])
            blocks.extend(taken[-1])
        return taken

    def _drop(self, job: Job) -> None:
        for group, (free, blocks) in enumerate(zip(self._free, job.blocks or [], strict=True)):
            shared = job.shared[group] if job.shared else []
            free.extend(block for block in blocks if block not in shared)
        job.blocks = None
        self._finished.append(job.request_id)


def _new_request(job: Job) -> NewRequest:
    return NewRequest(
        request_id=job.request_id,
        token_ids=job.prompt + job.output,
        num_prompt_tokens=len(job.prompt),
        num_computed_tokens=job.num_computed,
        block_ids=[list(blocks) for blocks in job.blocks or []],
        sampling=job.sampling,
    )


def _check_guesses(batch: StepBatch, result: StepResult) -> None:
    """Tokens are those of the guesses, and one more that no guess had."""
    for name, tokens in zip(batch.request_ids, result.sampled_token_ids, strict=True):
        guessed = batch.draft_token_ids.get(name, [])
        if tokens[:-1] != guessed[: len(tokens) - 1] or len(tokens) > len(guessed) + 1:
            raise Finding(
                f"step {batch.step_id} answers request {name} with {tokens} on the guesses "
                f"{guessed}: all but the last token are guesses that were right"
            )


def _check_result(batch: StepBatch, result: StepResult) -> None:
    if result.step_id != batch.step_id:
        raise Finding(f"step {batch.step_id} was answered as step {result.step_id}")
    if result.errors:
        raise Finding(f"a plain step failed requests: {result.errors}")
    _check_guesses(batch, result)
    counts = [min(1, len(tokens)) for tokens in result.sampled_token_ids]
    if counts != [int(samples) for samples in batch.samples]:
        raise Finding(
            f"step {batch.step_id} sampled {counts} tokens; its batch asks for "
            f"{[int(s) for s in batch.samples]}: only a request's last token is sampled"
        )
