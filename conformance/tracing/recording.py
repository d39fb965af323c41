"""Records what a worker is given and what it answers, with its operators where they can be heard.

The worker stands behind a wrapper of the same interface, so that any engine can be recorded.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

import quire
from quire.conformance.tracing.tapping import bits_of, tapped_device, tensors_of
from quire.conformance.tracing.traces import (
    FORMAT_VERSION,
    NONE,
    TENSORS,
    OperatorCall,
    TensorRecord,
    TraceHeader,
    TraceStep,
    TraceWriter,
    digest_model,
)
from quire.core.config import EngineConfig
from quire.core.engine.core import EngineCore, StartTimer, start_core
from quire.core.errors import UnsupportedError
from quire.core.interface import (
    INTERFACE_VERSION,
    CachePlan,
    Device,
    ModelInfo,
    StepBatch,
    StepResult,
    Worker,
    WorkerConfig,
)
from quire.core.planning import PlannedEngine, plan_engine
from quire.core.worker.worker import DefaultWorker


class OperatorLog:
    """A listener that keeps what it hears, while it is told to."""

    def __init__(self, *, with_data: bool) -> None:
        self.is_on = False
        self._with_data = with_data
        self._calls: list[OperatorCall] = []

    def call(
        self,
        op: str,
        inputs: Mapping[str, Tensor],
        run: Callable[[], object],
        written: Mapping[str, Tensor],
    ) -> object:
        """Runs the operator; notes what went in and what came out."""
        if not self.is_on:
            return run()
        before = [self.record(name, tensor) for name, tensor in inputs.items()]
        result = run()
        after = {**tensors_of(result, "result"), **written}
        outputs = [self.record(name, tensor) for name, tensor in after.items()]
        self._calls.append(OperatorCall(op, before, outputs))
        return result

    def take(self) -> list[OperatorCall]:
        """The calls since the last time."""
        taken, self._calls = self._calls, []
        return taken

    def record(self, name: str, tensor: Tensor) -> TensorRecord:
        """One tensor as it is now."""
        bits = bits_of(tensor)
        return TensorRecord(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            hashlib.sha256(bits).hexdigest()[:16],
            bits if self._with_data else b"",
        )


class RecordingWorker(Worker):
    """Passes everything on, one step at a time, and writes it down."""

    def __init__(
        self, inner: Worker, writer: TraceWriter, header: TraceHeader, log: OperatorLog
    ) -> None:
        self._inner = inner
        self._writer = writer
        self._header = header
        self._log = log

    def load_model(self) -> ModelInfo:
        """The inner worker's."""
        self._header = _with(self._header, model_info=self._inner.load_model())
        return self._header.model_info

    def cache_budget_bytes(self) -> int:
        """The inner worker's."""
        return self._inner.cache_budget_bytes()

    def allocate_cache(self, plan: CachePlan) -> None:
        """Writes the header, which is complete now."""
        self._inner.allocate_cache(plan)
        self._header = _with(self._header, cache_plan=plan)
        self._writer.write_header(self._header)

    def warm_up(self) -> None:
        """The inner worker's; not recorded."""
        self._inner.warm_up()

    def warm_up_more(self) -> bool:
        """The inner worker's; not recorded."""
        return self._inner.warm_up_more()

    def execute(self, batch: StepBatch) -> StepResult:
        """Runs and records one step. Raises what the inner worker raises; that is not recorded."""
        self._log.is_on = True
        try:
            result = self._inner.execute(batch)
        finally:
            self._log.is_on = False
            calls = self._log.take()
        self._writer.write_step(TraceStep(batch=batch, result=result, calls=calls))
        return result

    def memory_by_tag(self) -> dict[str, int]:
        """The inner worker's."""
        return self._inner.memory_by_tag()

    def health(self) -> None:
        """The inner worker's."""
        self._inner.health()

    def close(self) -> None:
        """Closes the inner worker; the trace is closed by whoever opened it."""
        self._inner.close()


def _with(header: TraceHeader, **changes: Any) -> TraceHeader:
    import msgspec

    return msgspec.structs.replace(header, **changes)


def recorded_device(
    device: Device, writer: TraceWriter, *, backend: str, detail: str
) -> tuple[Device, str]:
    """(a copy of `device` whose workers record, why its operators are not recorded: or empty)."""
    log = OperatorLog(with_data=detail == TENSORS)
    heard, why = device, ""
    if detail != NONE:
        try:
            heard = tapped_device(device, log)
        except UnsupportedError as error:
            why = error.reasons[0].have
    other = copy.copy(heard)

    def make_worker(config: WorkerConfig) -> Worker:
        own = device.make_worker(config)
        reason = why or ("the device brings a worker of its own" if own is not None else "")
        header = TraceHeader(
            format_version=FORMAT_VERSION,
            quire_version=quire.__version__,
            interface_version=INTERFACE_VERSION,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            backend=backend,
            device=device.info.name,
            architecture=device.info.architecture,
            detail=NONE if reason else detail,
            why_no_operators=reason if detail != NONE else "",
            model_digest=digest_model(Path(config.model)),
            worker_config=config,
            model_info=_NOTHING_LOADED,
            cache_plan=CachePlan(num_blocks=[]),
        )
        return RecordingWorker(own or DefaultWorker(heard, config), writer, header, log)

    setattr(other, "make_worker", make_worker)  # noqa: B010 - the copy's, not the class's
    return other, why


_NOTHING_LOADED = ModelInfo(
    architecture="",
    vocab_size=0,
    max_model_len=0,
    cache_groups=[],
    num_parameters=0,
    weight_bytes=0,
    dtype="",
)


def record(
    model: str,
    prompts: Sequence[Any],
    path: Path,
    *,
    sampling: Any,
    detail: str = TENSORS,
    **settings: Any,
) -> int:
    """Runs prompts through an engine and records every step into `path`; how many there were.

    `sampling` is a SamplingParams, `settings` are those of `LLM`.
    Raises: what the engine's start raises; RequestError for a prompt that cannot be.
    """
    from quire.core.engine.llm import LLM

    with TraceWriter(path) as writer:

        def build(user: EngineConfig) -> EngineCore:
            planned = plan_engine(user)
            name = planned.plan.device.name.partition(":")[0]
            device, _ = recorded_device(planned.device, writer, backend=name, detail=detail)
            recorded = PlannedEngine(
                plan=planned.plan, device=device, description=planned.description
            )
            return start_core(recorded, StartTimer())

        with LLM(model, build_core=build, overlap_scheduling=False, **settings) as llm:
            llm.generate(list(prompts), sampling, use_tqdm=False)
        return writer.num_steps
