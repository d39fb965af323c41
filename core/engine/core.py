"""The engine core: plans, builds, and turns the wheel of schedule, execute, update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from quire.core.config import EngineConfig
from quire.core.engine.constraints import Constraints
from quire.core.engine.facts import EngineFacts, EngineStatistics, PlanFacts
from quire.core.engine.grammars import core_compiler
from quire.core.engine.late_warm_up import LateWarmUp
from quire.core.engine.messages import same_death
from quire.core.engine.pooling import refuse_text
from quire.core.errors import (
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    EngineDeadError,
    RequestError,
)
from quire.core.executor.executor import Executor
from quire.core.executor.in_process import make_executor
from quire.core.executor.worker_process import WorkerProcess
from quire.core.interface.worker import CachePlan, ModelInfo, PendingStep, StepBatch
from quire.core.kv_cache.manager import KVCacheManager
from quire.core.kv_cache.sizing import plan_cache
from quire.core.planning import Plan, PlannedEngine, plan_engine
from quire.core.scheduler.request import FinishReason, RequestSpec, RequestUpdate
from quire.core.scheduler.scheduler import Scheduler
from quire.core.scheduler.settings import SchedulerSettings

MAX_STEPS_IN_FLIGHT = 2
"""One runs, and the next waits ready behind it; more would only delay what comes back."""

STEPS_ALONE_AFTER_FAILURE = 64
"""Steps that do not overlap after one ran out of memory: were the next to fail too, none got on."""


@dataclass(slots=True)
class StartTimer:
    """Seconds of each stage of the start."""

    stages_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what runs inside."""
        began = time.monotonic()
        yield
        self.stages_s[name] = time.monotonic() - began


@dataclass(frozen=True, slots=True)
class StepInFlight:
    """A step that was handed to the executor."""

    batch: StepBatch
    pending: PendingStep


class EngineCore:
    """Owns the scheduler and the executor. Used by one thread.

    After an EngineDeadError it only answers with that error again; `close` still releases
    everything.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        facts: EngineFacts,
        scheduler: Scheduler,
        cache: KVCacheManager,
        executor: Executor,
    ) -> None:
        """`config` is resolved; `executor` is ready for its first step."""
        self.config = config
        self.facts = facts
        self.scheduler = scheduler
        self._cache = cache
        self._executor = executor
        compiler = core_compiler(facts.model_directory, config.tokenizer, facts.vocab_size)
        self._constraints = Constraints(compiler)
        self._num_ahead = MAX_STEPS_IN_FLIGHT if config.overlap_scheduling else 1
        self._num_steps_alone = 0
        """So many steps run one at a time: there was no memory for two."""
        self._in_flight: deque[StepInFlight] = deque()
        self._refused: list[RequestUpdate] = []
        self._num_added = 0
        self._num_prompt_tokens = 0
        self._late = LateWarmUp(executor)
        self._dead: EngineDeadError | None = None

    @classmethod
    def build(cls, user: EngineConfig) -> EngineCore:
        """Chooses the device, plans, loads, sizes the cache, warms up; refuses before weights load.

        Raises: ConfigError, UnsupportedError, PluginError, CheckpointError, DeviceError.
        """
        timer = StartTimer()
        if user.worker_process:
            return _start_apart(user, timer)
        with timer.stage("plan"):
            planned = plan_engine(user)
        return start_core(planned, timer)

    def add(self, spec: RequestSpec) -> None:
        """Takes a request in. One that is refused ends with an update at the next step."""
        self._num_added += 1
        try:
            if spec.pooling is None:
                refuse_text(self.facts.tasks, self.facts.served_model_name)
            if spec.constraint is None:
                self.scheduler.add(spec)
            else:
                self._constraints.park(spec, spec.constraint)
        except RequestError as error:
            self._refused.append(
                RequestUpdate(spec.request_id, [], FinishReason.ERROR, error=str(error))
            )
            return
        self._num_prompt_tokens += len(spec.prompt_token_ids)

    def prepare_grammars(self) -> None:
        """Begins, in a thread, what the first request with a grammar would make others wait for."""
        self._constraints.prepare()

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """Ends requests at once, also in the middle of a step. Unknown ids are ignored."""
        ids = list(request_ids)
        waited = self._constraints.forget(ids)
        ends = [RequestUpdate(request_id, [], FinishReason.ABORT) for request_id in waited]
        return ends + self.scheduler.abort(ids)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(
            self._refused
            or self._in_flight
            or self.scheduler.has_work()
            or self._constraints.num_parked
        )

    def step(self) -> list[RequestUpdate]:
        """Schedules what can be, then waits for the oldest step and returns what it brought.

        Where the device is asynchronous the next step is handed over before this one is
        waited for. A step that ran out of memory is tried again in smaller ones.
        Raises: EngineDeadError with the root cause for anything else that fails; the core
        is dead then.
        """
        self._raise_if_dead()
        if self._constraints.num_parked:
            self._admit_compiled()
        refused, self._refused = self._refused, []
        try:
            updates = self._step()
            self._late.between_steps(self.scheduler.num_waiting + self._constraints.num_parked)
            return refused + updates if refused else updates
        except Exception as error:  # whatever it is, no step can follow
            self._dead = dead_error(error)
            raise self._dead from error
        except BaseException:  # Ctrl-C in the middle: books and device may differ
            self._dead = EngineDeadError("a step was interrupted; restart the engine")
            raise

    def warm_up_more(self) -> bool:
        """Does one piece of what the start left for later; whether it is worth asking again.

        For moments without work. Raises: EngineDeadError, DeviceLost.
        """
        self._raise_if_dead()
        return self._late.do_piece()

    def reset_prefix_cache(self) -> bool:
        """Forgets cached prefixes. Running requests keep their blocks."""
        self._cache.reset_prefix_cache()
        return True

    def statistics(self) -> EngineStatistics:
        """The numbers of this moment."""
        scheduler = self.scheduler.statistics()
        return EngineStatistics(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._constraints.num_parked,
            cache_usage=scheduler.cache_usage,
            num_steps=scheduler.num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_prompt_tokens=scheduler.num_prefix_hit_tokens,
            num_output_tokens=scheduler.num_sampled_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_finished=self._num_added - scheduler.num_running - scheduler.num_waiting,
            num_failed_steps=scheduler.num_failed_steps,
            memory_bytes=self._executor.memory_by_tag(),
        )

    def register_logits_processor(self, name: str, function: Any) -> None:
        """Makes a function known to the worker of this process.

        Raises: RequestError if it takes none.
        """
        self._executor.register_logits_processor(name, function)

    def health(self) -> None:
        """Returns if steps can run. Raises: EngineDeadError, DeviceLost."""
        self._raise_if_dead()
        self._executor.health()

    def watch(self, on_lost: Callable[[], None]) -> None:
        """Has `on_lost` called, from any thread, when a worker is gone; then ask `health`."""
        self._executor.watch(on_lost)

    def close(self) -> None:
        """Drops all requests and releases the device. Calling twice is harmless."""
        self._in_flight.clear()
        self._constraints.close()
        self._executor.close()

    def _raise_if_dead(self) -> None:
        if self._dead is not None:
            raise same_death(self._dead)

    def _admit_compiled(self) -> None:
        """Lets those in whose grammar is ready; waits a moment for it if there is nothing else."""
        if not (self._refused or self._in_flight or self.scheduler.has_work()):
            self._constraints.wait()
        self._refused += self._constraints.take_ready(self.scheduler.add)

    def _step(self) -> list[RequestUpdate]:
        updates = self._submit_steps()
        if not self._in_flight:
            return updates
        oldest = self._in_flight.popleft()
        try:
            result = oldest.pending.result()
        except DeviceOutOfMemory as error:
            return updates + self._fail(oldest.batch, error)
        self._num_steps_alone = max(0, self._num_steps_alone - 1)
        updates += self.scheduler.update(oldest.batch, result)
        return self._constraints.follow(updates, self.scheduler.complete)

    def _submit_steps(self) -> list[RequestUpdate]:
        """Hands steps over until enough are in flight, or memory is short until one is back."""
        while len(self._in_flight) < (1 if self._num_steps_alone else self._num_ahead):
            batch = self.scheduler.schedule()
            if batch is None:
                break
            batch = self._constraints.with_masks(batch)
            try:
                pending = self._executor.submit(batch)
            except DeviceOutOfMemory as error:
                return self._fail(batch, error)
            self._in_flight.append(StepInFlight(batch, pending))
        return []

    def _fail(self, batch: StepBatch, error: DeviceOutOfMemory) -> list[RequestUpdate]:
        """The step did not happen.

        Later ones built on it: the device finishes them, and nobody looks.
        """
        later = [one for one in self._in_flight if one.batch.step_id > batch.step_id]
        for one in later:
            self._in_flight.remove(one)
            _wait_for_nothing(one.pending)
        if self._num_ahead > 1:
            self._num_steps_alone = STEPS_ALONE_AFTER_FAILURE
        ends = self.scheduler.fail_step(batch, str(error))
        return self._constraints.follow(ends, self.scheduler.complete)


def _wait_for_nothing(pending: PendingStep) -> None:
    try:
        pending.result()
    except DeviceLost:
        raise
    except DeviceError:  # it was built on a step that did not happen
        return


def dead_error(cause: BaseException) -> EngineDeadError:
    """The one error for everybody who waits, with the root cause in words."""
    if isinstance(cause, EngineDeadError):
        return cause
    return EngineDeadError(
        "the engine core has died; restart the engine",
        root_cause=f"{type(cause).__name__}: {cause}",
    )


def start_core(planned: PlannedEngine, timer: StartTimer) -> EngineCore:
    """The core for a plan, on the device that was opened for it. The core owns the device.

    Raises: CheckpointError, UnsupportedError, DeviceError; ConfigError if not one request fits.
    """
    executor = make_executor(planned.device, planned.plan.worker_config)
    return _start_or_close(what_is_planned(planned.plan), executor, timer)


def start_worker(config: EngineConfig) -> tuple[PlanFacts, Executor]:
    """What the process of a worker begins with: it alone opens the device."""
    planned = plan_engine(config)
    facts = what_is_planned(planned.plan)
    return facts, make_executor(planned.device, planned.plan.worker_config)


def _start_apart(user: EngineConfig, timer: StartTimer) -> EngineCore:
    """As `start_core`, with the worker in a process of its own; this one loads no driver."""
    executor = WorkerProcess(start_worker, user)
    try:
        with timer.stage("plan"):
            plan = executor.started(PlanFacts)
    except BaseException:
        executor.close()
        raise
    return _start_or_close(plan, executor, timer)


def _start_or_close(plan: PlanFacts, executor: Executor, timer: StartTimer) -> EngineCore:
    try:
        return _start(plan, executor, timer)
    except BaseException:
        executor.close()
        raise


def _start(plan: PlanFacts, executor: Executor, timer: StartTimer) -> EngineCore:
    config = plan.config
    with timer.stage("load"):
        info = executor.load_model()
    with timer.stage("measure"):
        budget_bytes = executor.cache_budget_bytes()
    max_model_len = min(info.max_model_len, config.max_model_len or info.max_model_len)
    cache_plan = plan_cache(
        info.cache_groups,
        budget_bytes=budget_bytes,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    with timer.stage("allocate"):
        executor.allocate_cache(cache_plan)
    with timer.stage("warm_up"):
        executor.warm_up()
    facts = make_facts(plan, info, cache_plan, max_model_len, timer.stages_s)
    return make_core(config, facts, info, cache_plan, executor)


def make_core(
    config: EngineConfig,
    facts: EngineFacts,
    info: ModelInfo,
    cache_plan: CachePlan,
    executor: Executor,
) -> EngineCore:
    """The core of parts that are ready: the model is loaded and the cache allocated."""
    cache = KVCacheManager(
        info.cache_groups, cache_plan, enable_prefix_caching=config.enable_prefix_caching
    )
    settings = SchedulerSettings(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=facts.max_model_len,
        policy=config.scheduling_policy,
        enable_chunked_prefill=config.enable_chunked_prefill,
        max_num_queued=config.max_num_queued,
        num_guessed_tokens=config.num_speculative_tokens,
    )
    scheduler = Scheduler(settings, cache)
    return EngineCore(
        config=config, facts=facts, scheduler=scheduler, cache=cache, executor=executor
    )


def what_is_planned(plan: Plan) -> PlanFacts:
    """Of a plan, what the engine core goes on with."""
    return PlanFacts(
        config=plan.config,
        model_directory=str(plan.directory),
        device=plan.device.name,
        device_name=plan.device.info.name,
        kernels=dict(plan.kernels),
        changes=[str(change) for change in plan.changes],
    )


def make_facts(
    plan: PlanFacts,
    info: ModelInfo,
    cache_plan: CachePlan,
    max_model_len: int,
    startup_s: dict[str, float],
) -> EngineFacts:
    """What the engine says about itself."""
    config = plan.config
    return EngineFacts(
        model=config.model,
        served_model_name=config.served_model_name or config.model,
        model_directory=plan.model_directory,
        architecture=info.architecture,
        vocab_size=info.vocab_size,
        max_model_len=max_model_len,
        num_parameters=info.num_parameters,
        weight_bytes=info.weight_bytes,
        dtype=info.dtype,
        device=plan.device,
        device_name=plan.device_name,
        num_blocks=list(cache_plan.num_blocks),
        num_cache_tokens=_num_cache_tokens(info, cache_plan),
        providers={**plan.kernels, **info.providers},
        changes=list(plan.changes),
        tasks=list(info.tasks),
        labels=list(info.labels),
        vector_size=info.vector_size,
        encoder_input=info.encoder_input,
        accepts=list(info.accepts),
        source_steps=list(info.source_steps),
        max_source_tokens=max((group.max_tokens or 0 for group in info.cache_groups), default=0),
        startup_s=startup_s,
    )


def _num_cache_tokens(info: ModelInfo, cache_plan: CachePlan) -> int:
    """Of the group that holds the fewest; block 0 belongs to nobody."""
    sizes: Sequence[int] = [
        (num_blocks - 1) * group.block_size
        for group, num_blocks in zip(info.cache_groups, cache_plan.num_blocks, strict=True)
        if group.max_tokens is None
    ]
    return min(sizes, default=0)


BuildCore = Callable[[EngineConfig], EngineCore]
"""How a core is made from what the user configured.

Importable by name, where another process is to call it.
"""
