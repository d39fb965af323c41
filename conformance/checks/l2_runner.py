"""Level 2: a small model through the device's Worker, however the work is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt

from quire.conformance.cases import check, dtypes, product
from quire.conformance.numerics import Measurement
from quire.conformance.oracles import model as oracle
from quire.conformance.stepping import GREEDY, Job, Steps
from quire.conformance.trial import Trial
from quire.conformance.truth import ModelTruth
from quire.core.interface import (
    CachePlan,
    Capabilities,
    Device,
    PositionLogprobs,
    SamplingSpec,
    Worker,
    WorkerConfig,
)

Array = npt.NDArray[Any]
_NUM_BLOCKS = 64
_DTYPES = dtypes("float32", "bfloat16")
_LENGTHS = {"r50": 50, "r7": 7, "r33": 33, "r1": 1, "r16": 16}
_NUM_OUTPUT = 8


def _needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if arguments["dtype"] not in claims.cache_dtypes:
        return f"cache dtype {arguments['dtype']} is not claimed"
    return ""


def _needs_batch_invariant(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if claims.determinism not in {"batch_invariant", "invariant"}:
        return f"determinism {claims.determinism!r} claims no independence of the batch"
    return _needs(claims, arguments)


def _needs_invariant(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if claims.determinism != "invariant":
        return f"determinism {claims.determinism!r} claims no independence of chunks and prefixes"
    return _needs(claims, arguments)


class Runner:
    """A loaded worker and the truth about its model."""

    def __init__(self, trial: Trial, dtype: str, device: Device) -> None:
        self._trial = trial
        self._dtype = dtype
        self._device = device
        claims = trial.capabilities
        size = 32 if claims.head_sizes is None or 32 in claims.head_sizes else claims.head_sizes[0]
        self.model = oracle.TinyLlama(head_size=size)
        self.max_tokens = min((128, *claims.token_buckets[-1:]))
        self.max_requests = min((8, *claims.request_buckets[-1:]))
        self.worker = self._make_worker()
        info = self.worker.load_model()
        self._num_groups = len(info.cache_groups)
        self.worker.cache_budget_bytes()
        self.worker.allocate_cache(CachePlan(num_blocks=[_NUM_BLOCKS] * self._num_groups))
        self.worker.warm_up()
        while self.worker.warm_up_more():  # an engine would do it between steps
            pass
        trial.provider = info.providers.get("paged_attention", "")

    def _make_worker(self) -> Worker:
        trial = self._trial
        config = WorkerConfig(
            model=str(self.model.save(trial.directory)),
            dtype=self._dtype,
            cache_dtype=self._dtype,
            block_size=trial.block_size,
            max_model_len=256,
            max_num_seqs=self.max_requests,
            max_num_batched_tokens=self.max_tokens,
            device_memory_fraction=0.5,
            cache_memory_bytes=1 << 26,
        )
        own = self._device.make_worker(config)
        if own is not None:
            return own
        from quire.core.worker.worker import DefaultWorker

        return DefaultWorker(self._device, config)

    def steps(self) -> Steps:
        """A new engine for the worker, in other blocks."""
        return Steps(
            self.worker,
            block_size=self._trial.block_size,
            num_blocks=_NUM_BLOCKS,
            num_groups=self._num_groups,
            max_tokens=self.max_tokens,
            max_requests=self.max_requests,
            rng=self._trial.rng,
        )

    def prompt(self, length: int) -> list[int]:
        """Random tokens."""
        return [int(t) for t in self._trial.rng.integers(4, self.model.vocab_size, length)]

    def truth(self, token_ids: Sequence[int]) -> tuple[Array, Array]:
        """(log-probabilities [n, V] after each token in float64, the error allowed at each [n])."""
        return ModelTruth(self.model, self._dtype).logprobs(token_ids)

    def hold_greedy(self, job: Job, what: str) -> None:
        """Every token of a greedy output is the model's most likely one, given those before it."""
        sequence = job.prompt + job.output
        logprobs, slack = self.truth(sequence[:-1])
        begin = len(job.prompt) - 1
        self._trial.require(
            len(job.output) == job.max_tokens, f"{what}: {len(job.output)} tokens were given"
        )
        for number, token in enumerate(job.output):
            row = logprobs[begin + number]
            behind = float(row.max() - row[token]) if 0 <= token < len(row) else float("inf")
            self._note(behind, 2 * float(slack[begin + number]), f"output token {number}")
            self._trial.require(
                behind <= 2 * slack[begin + number],
                f"{what}: output token {number} of request {job.request_id} is {token}, which the "
                f"float64 model finds {behind:.3g} less likely (in log-probability) than "
                f"{int(row.argmax())}; rounding explains {2 * slack[begin + number]:.3g}",
            )

    def hold_logprobs(
        self, entries: Sequence[PositionLogprobs], logprobs: Array, slack: Array, what: str
    ) -> None:
        """Reported log-probabilities are the model's; entry i belongs to row i."""
        self._trial.require(
            len(entries) == len(logprobs), f"{what}: {len(entries)} instead of {len(logprobs)}"
        )
        for number, (entry, row) in enumerate(zip(entries, logprobs, strict=True)):
            ids = [entry.token_id, *entry.top_ids]
            values = [entry.logprob, *entry.top_logprobs]
            error = max(abs(v - row[i]) for i, v in zip(ids, values, strict=True))
            bound = 2 * float(slack[number])
            self._note(float(error), bound, f"position {number}")
            self._trial.require(
                error <= bound,
                f"{what}: at position {number} a log-probability is off by {error:.3g}; the "
                f"float64 model allows {bound:.3g}",
            )

    def _note(self, error: float, bound: float, where: str) -> None:
        self._trial.measurements.append(Measurement(error=error, bound=bound, where=where))


@contextmanager
def running(trial: Trial, dtype: str, device: Device | None = None) -> Iterator[Runner]:
    """A loaded worker of the device under test, or of a variant of it; closed twice."""
    runner = Runner(trial, dtype, device or trial.device)
    try:
        yield runner
    finally:
        runner.worker.close()
        runner.worker.close()


def _add_all(runner: Runner, steps: Steps, sampling: SamplingSpec = GREEDY) -> list[Job]:
    return [
        steps.add(name, runner.prompt(n), _NUM_OUTPUT, sampling) for name, n in _LENGTHS.items()
    ]


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def greedy(trial: Trial, *, dtype: str) -> None:
    """One request alone gives the most likely tokens."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        job = steps.add("a", runner.prompt(37), 12)
        steps.run()
        runner.hold_greedy(job, "a request alone")


_CHUNKS = {f"chunk{n}": {"chunk": n} for n in (1, 5, 16, 33)}


@check(level=2, op="runner", over=product(_CHUNKS, _DTYPES), needs=_needs)
def chunked_prefill(trial: Trial, *, chunk: int, dtype: str) -> None:
    """A prompt cut into chunks of any size gives the same tokens."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        jobs = _add_all(runner, steps)
        steps.run(chunk)
        for job in jobs:
            runner.hold_greedy(job, f"prompts cut into chunks of {chunk}")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def batch_mix(trial: Trial, *, dtype: str) -> None:
    """Requests that come and go while others decode do not touch each other."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        jobs = []
        for name, length in _LENGTHS.items():
            jobs.append(steps.add(name, runner.prompt(length), _NUM_OUTPUT))
            steps.run(20, max_steps=2)
        steps.run(20)
        for job in jobs:
            runner.hold_greedy(job, "requests that arrive one after another")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def prefix_reuse(trial: Trial, *, dtype: str) -> None:
    """A request that begins with another's blocks computes the rest alone."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        size = trial.block_size
        first = steps.add("first", runner.prompt(2 * size + 5), _NUM_OUTPUT)
        steps.run(64, max_steps=1)
        second = steps.add("second", first.prompt[: 2 * size] + runner.prompt(9), _NUM_OUTPUT)
        steps.reuse_prefix(second, first, 2)
        steps.run()
        for job in (first, second):
            runner.hold_greedy(job, "requests that share the blocks of a prefix")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def preempt_and_resume(trial: Trial, *, dtype: str) -> None:
    """A request whose blocks were taken goes on from its tokens as if nothing had happened."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        jobs = _add_all(runner, steps)
        steps.run(20, max_steps=4)
        for job in jobs[:3]:
            if job.blocks is not None:
                steps.preempt(job)
        steps.run(20)
        for job in jobs:
            runner.hold_greedy(job, "after preemption")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def overlapped_steps(trial: Trial, *, dtype: str) -> None:
    """Steps submitted before the last result was read give the same tokens."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        jobs = _add_all(runner, steps)
        steps.run_overlapped(20)
        for job in jobs:
            runner.hold_greedy(job, "steps submitted ahead")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def request_ids_return(trial: Trial, *, dtype: str) -> None:
    """A finished id that comes again is a new request; nothing of the old one is remembered."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        for number in range(3):
            job = steps.add("same", runner.prompt(21), 4)
            steps.run()
            runner.hold_greedy(job, f"use number {number + 1} of one request id")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def logprobs(trial: Trial, *, dtype: str) -> None:
    """Reported log-probabilities of output tokens are the model's own."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        jobs = _add_all(runner, steps, SamplingSpec(temperature=0.0, num_logprobs=4))
        steps.run(20)
        for job in jobs:
            truth, slack = runner.truth((job.prompt + job.output)[:-1])
            begin = len(job.prompt) - 1
            tokens = [entry.token_id for entry in job.logprobs]
            trial.require(tokens == job.output, "logprobs are not those of the output's tokens")
            runner.hold_logprobs(job.logprobs, truth[begin:], slack[begin:], "output tokens")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def prompt_logprobs(trial: Trial, *, dtype: str) -> None:
    """Log-probabilities of the prompt's tokens, which is cut into chunks, are the model's own."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        sampling = SamplingSpec(temperature=0.0, num_prompt_logprobs=2)
        job = steps.add("a", runner.prompt(41), 2, sampling)
        steps.run(13)
        truth, slack = runner.truth(job.prompt)
        tokens = [entry.token_id for entry in job.prompt_logprobs]
        trial.require(tokens == job.prompt[1:], "prompt_logprobs are not about the prompt's tokens")
        runner.hold_logprobs(job.prompt_logprobs, truth[:-1], slack[:-1], "prompt tokens")


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def seeds(trial: Trial, *, dtype: str) -> None:
    """A seed decides: the same alone, in a batch and after preemption; another one differs."""
    with running(trial, dtype) as runner:
        prompt = runner.prompt(30)
        answers: dict[str, list[int]] = {}
        for name, seed in (("alone", 7), ("other", 8)):
            answers[name] = _sampled(runner, prompt, seed)
        for name, disturb in (("batch", _no_disturbance), ("preempted", _preemption)):
            answers[name] = _sampled(runner, prompt, 7, among=3, disturb=disturb)
        trial.require(
            answers["alone"] != answers["other"],
            "two seeds gave the same 12 tokens at temperature 2: is the seed used?",
        )
        for name in ("batch", "preempted"):
            trial.require(
                answers[name] == answers["alone"],
                f"the same seed gave {answers['alone']} alone and {answers[name]} ({name}): token "
                "i must use random number i of its seed, whatever else happens",
            )


def _no_disturbance(steps: Steps) -> None:
    return None


def _preemption(steps: Steps) -> None:
    steps.run(64, max_steps=4)
    steps.preempt(steps.jobs["a"])


def _sampled(
    runner: Runner,
    prompt: list[int],
    seed: int,
    *,
    among: int = 0,
    disturb: Callable[[Steps], None] = _no_disturbance,
) -> list[int]:
    steps = runner.steps()
    for number in range(among):
        other = SamplingSpec(temperature=1.0, seed=100 + number)
        steps.add(f"other{number}", runner.prompt(10 + number), 5, other)
    job = steps.add("a", prompt, 12, SamplingSpec(temperature=2.0, top_k=50, seed=seed))
    disturb(steps)
    steps.run()
    return job.output


@check(level=2, op="runner", over=_DTYPES, needs=_needs)
def constraints(trial: Trial, *, dtype: str) -> None:
    """Allowed tokens, biases and penalties of one request bind it and nobody else."""
    with running(trial, dtype) as runner:
        steps = runner.steps()
        allowed = (9, 77, 130)
        bound = steps.add(
            "bound", runner.prompt(8), 6, SamplingSpec(seed=3, allowed_token_ids=allowed)
        )
        biased = steps.add(
            "biased", runner.prompt(8), 3, SamplingSpec(temperature=0.0, logit_bias=((55, 1000.0),))
        )
        free = steps.add("free", runner.prompt(8), 6)
        steps.run()
        trial.require(
            set(bound.output) <= set(allowed),
            f"allowed_token_ids are {allowed}; the output is {bound.output}",
        )
        trial.require(biased.output == [55] * 3, f"a bias of 1000 on 55 gave {biased.output}")
        runner.hold_greedy(free, "a plain request beside constrained ones")


@check(level=2, op="runner", over=_DTYPES, needs=_needs_batch_invariant)
def same_bits_in_any_batch(trial: Trial, *, dtype: str) -> None:
    """Where independence of the batch is claimed, log-probabilities have the same bits."""
    with running(trial, dtype) as runner:
        prompt = runner.prompt(29)
        alone = _probabilities(runner, prompt, among=0, chunk=64)
        _hold_bits(trial, alone, _probabilities(runner, prompt, among=4, chunk=64), "in a batch")


@check(level=2, op="runner", over=_DTYPES, needs=_needs_invariant)
def same_bits_in_any_chunks(trial: Trial, *, dtype: str) -> None:
    """Where full invariance is claimed, chunks of a prompt change no bit."""
    with running(trial, dtype) as runner:
        prompt = runner.prompt(45)
        whole = _probabilities(runner, prompt, among=0, chunk=64)
        for chunk in (1, 7, 16):
            cut = _probabilities(runner, prompt, among=2, chunk=chunk)
            _hold_bits(trial, whole, cut, f"cut into chunks of {chunk}")


def _probabilities(runner: Runner, prompt: list[int], *, among: int, chunk: int) -> list[float]:
    steps = runner.steps()
    for number in range(among):
        steps.add(f"other{number}", runner.prompt(10 + 7 * number), 4)
    job = steps.add("a", prompt, 6, SamplingSpec(temperature=0.0, num_logprobs=0))
    steps.run(chunk)
    return [entry.logprob for entry in job.logprobs]


def _hold_bits(trial: Trial, one: list[float], other: list[float], how: str) -> None:
    trial.require(
        one == other,
        f"a request's log-probabilities have other bits {how} ({other}) than alone ({one}); the "
        f"device claims determinism {trial.capabilities.determinism!r}",
    )
