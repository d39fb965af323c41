"""Replays a trace on another device in a fresh worker, and says what differs first.

First the steps run as they are, and their results are compared. Then, where the trace holds tensors
and the device's operators can be heard, they run again with each operator given the inputs that
were recorded: what differs then is the operator's own doing, and no earlier one's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.conformance.numerics import compare_two
from quire.conformance.tracing.layers import layer_names
from quire.conformance.tracing.recording import OperatorLog
from quire.conformance.tracing.tapping import tapped_device, tensors_of
from quire.conformance.tracing.traces import (
    DIGESTS,
    NONE,
    OperatorCall,
    TensorRecord,
    Trace,
    TraceStep,
    digest_model,
)
from quire.core.errors import ConfigError, QuireError, UnsupportedError
from quire.core.interface import OP_SPECS, Device, Reason, StepResult, Worker, WorkerConfig
from quire.core.worker.worker import DefaultWorker

Array = npt.NDArray[Any]
_TOLERANCES = {spec.name: spec.tolerance for spec in OP_SPECS}


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorDifference:
    """One call of which the replay gave something else."""

    step_id: int
    layer: str
    op: str
    number: int
    """Of the call in its step, from 0."""
    output: str
    headroom: float
    """Error / bound by the rule for two devices; above 1 is a difference."""
    where: str
    message: str


@dataclass(slots=True, kw_only=True)
class OperatorSummary:
    """All calls of one operator."""

    num_calls: int = 0
    headroom: float = 0.0
    """The largest of all."""


@dataclass(slots=True, kw_only=True)
class Replay:
    """What a replay found."""

    num_steps: int
    result_difference: str = ""
    """Of the first step whose results differ; empty: none."""
    operators: dict[str, OperatorSummary] = field(default_factory=dict)
    operator_difference: OperatorDifference | None = None
    why_no_operators: str = ""
    """Empty: they were compared."""

    @property
    def is_same(self) -> bool:
        """Whether nothing differs beyond rounding.

        Tokens may differ where every operator is within rounding: two were nearly as likely.
        """
        if self.why_no_operators:
            return not self.result_difference
        return self.operator_difference is None


def replay(trace: Trace, device: Device, *, model: Path | None = None) -> Replay:
    """Replays on an opened device, which stays open.

    Raises: ConfigError if the model is not there or is another; UnsupportedError with every reason
    if the device cannot do what was recorded.
    """
    config = _config_for(trace, device, model)
    found = Replay(num_steps=len(trace.steps))
    with _worker(trace, device, config) as (worker, _):
        found.result_difference = _first_result(trace.steps, worker)
    found.why_no_operators = _why_no_operators(trace, device, config)
    if found.why_no_operators:
        return found
    if trace.header.detail == DIGESTS:
        _compare_digests(trace, device, config, found)
    else:
        _compare_operators(trace, device, config, found)
    return found


def _config_for(trace: Trace, device: Device, model: Path | None) -> WorkerConfig:
    recorded = trace.header.worker_config
    directory = model or Path(recorded.model)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"the model of the trace is not at {directory}; say where it is with --model DIRECTORY"
        )
    if digest_model(directory) != trace.header.model_digest:
        raise ConfigError(
            f"{directory} holds another model than was recorded: its config or weights differ"
        )
    config = msgspec.structs.replace(recorded, model=str(directory), options={})
    reasons = list(_reasons(config, device))
    if reasons:
        raise UnsupportedError(reasons, what=f"replaying this trace on {device.info.name}")
    return config


def _reasons(config: WorkerConfig, device: Device) -> Iterator[Reason]:
    claims = device.capabilities
    for code, need, have in (
        ("dtype", config.dtype, claims.dtypes),
        ("cache_dtype", config.cache_dtype, claims.cache_dtypes),
        ("block_size", config.block_size, claims.block_sizes),
    ):
        if need not in have:
            yield Reason(
                code=f"trace.{code}",
                need=f"{code} {need}, as recorded",
                have=", ".join(map(str, have)),
                remedy=f"record with a {code} that both devices claim",
            )
    yield from device.reasons_against(config)


def _why_no_operators(trace: Trace, device: Device, config: WorkerConfig) -> str:
    if trace.header.why_no_operators:
        return f"the trace has none: {trace.header.why_no_operators}"
    if trace.header.detail == NONE:
        return "the trace was recorded without them"
    if device.torch_device is None:
        return f"{device.info.name} has a runtime of its own that torch does not own"
    own = device.make_worker(config)
    if own is not None and not isinstance(own, DefaultWorker):
        own.close()
        return f"{device.info.name} brings a worker of its own"
    return ""


@contextmanager
def _worker(
    trace: Trace, device: Device, config: WorkerConfig, heard: Device | None = None
) -> Iterator[tuple[Worker, Device]]:
    """A fresh worker, ready for its first step; of `heard` where operators are listened to."""
    shown = heard or device
    worker = shown.make_worker(config) or DefaultWorker(shown, config)
    try:
        info = worker.load_model()
        groups = [(g.kind, g.window, g.block_size, g.num_layers) for g in info.cache_groups]
        recorded = trace.header.model_info.cache_groups
        if groups != [(g.kind, g.window, g.block_size, g.num_layers) for g in recorded]:
            raise ConfigError(
                f"the worker keeps its cache in groups {groups}, which is not how it was recorded; "
                "block ids of one mean nothing to the other"
            )
        worker.cache_budget_bytes()
        worker.allocate_cache(trace.header.cache_plan)
        yield worker, shown
    finally:
        worker.close()


# --- results --------------------------------------------------------------------------------------


def _first_result(steps: Sequence[TraceStep], worker: Worker) -> str:
    for step in steps:
        try:
            result = worker.execute(step.batch)
        except QuireError as error:
            return f"step {step.batch.step_id} raised {type(error).__name__}: {error}"
        if difference := _result_difference(step, result):
            return f"step {step.batch.step_id}: {difference}"
    return ""


def _result_difference(step: TraceStep, result: StepResult) -> str:
    recorded = step.result
    if result.errors != recorded.errors:
        return f"errors {result.errors}, recorded {recorded.errors}"
    for name, ours, theirs in zip(
        step.batch.request_ids, result.sampled_token_ids, recorded.sampled_token_ids, strict=True
    ):
        if ours != theirs:
            return f"request {name} got {ours}, recorded {theirs}"
    return ""


# --- operators ------------------------------------------------------------------------------------


class _Stopped(Exception):  # noqa: N818 - not an error
    """The first difference was found."""


class _Forcing:
    """A listener that gives each operator the recorded inputs and compares what comes out."""

    def __init__(self, found: Replay) -> None:
        self._found = found
        self._calls: Sequence[OperatorCall] = ()
        self._layers: Sequence[str] = ()
        self._step_id = 0
        self._next = 0
        self._key_norms: dict[str, float] = {}
        """The largest norm of any key so far, by layer."""
        self.is_on = False

    def begin(self, step: TraceStep) -> None:
        """The calls of the next step."""
        self._calls, self._next, self._step_id = step.calls, 0, step.batch.step_id
        self._layers = layer_names([call.op for call in step.calls])
        self.is_on = True

    def call(
        self,
        op: str,
        inputs: Mapping[str, Tensor],
        run: Callable[[], object],
        written: Mapping[str, Tensor],
    ) -> object:
        """Runs the operator on what was recorded, and leaves behind what was recorded."""
        if not self.is_on:
            return run()
        number = self._next
        if number >= len(self._calls) or self._calls[number].op != op:
            recorded = self._calls[number].op if number < len(self._calls) else "nothing more"
            self._stop(number, op, "", f"runs {op} where {recorded} was recorded")
        recorded_call = self._calls[number]
        self._next += 1
        for record in recorded_call.inputs:
            if record.name in inputs:
                self._force(number, op, inputs[record.name], record)
        result = run()
        after = {**tensors_of(result, "result"), **written}
        conditioning = self._conditioning(number, recorded_call)
        self._found.operators.setdefault(op, OperatorSummary()).num_calls += 1
        for record in recorded_call.outputs:
            if record.name not in after:
                self._stop(number, op, record.name, f"gives no {record.name}")
            self._hold(number, op, after[record.name], record, conditioning)
        return result

    def _conditioning(self, number: int, call: OperatorCall) -> Array | float:
        """By how much a softmax multiplies the rounding of its scores: by their size, at most.

        |q . k| / sqrt(D) <= |q| |k| / sqrt(D), for each query row.
        """
        inputs = {record.name: record for record in call.inputs}
        if not {"q", "k"} <= set(inputs) or not call.op.startswith("paged_attention"):
            return 0.0
        q, k = (_tensor_of(inputs[name]).double() for name in ("q", "k"))
        layer = self._layers[number]
        largest = max(self._key_norms.get(layer, 0.0), float(k.norm(dim=-1).max()))
        self._key_norms[layer] = largest
        norms = q.norm(dim=-1).flatten() * largest / q.shape[-1] ** 0.5
        return np.asarray(norms.numpy())

    def _force(self, number: int, op: str, tensor: Tensor, record: TensorRecord) -> None:
        wanted = _tensor_of(record)
        rows = _common_rows(tensor, wanted)
        if rows is None:
            shapes = f"{tuple(tensor.shape)} where {record.shape} was recorded"
            self._stop(number, op, record.name, f"is given {record.name} of shape {shapes}")
        tensor[rows].copy_(wanted[rows])

    def _hold(
        self,
        number: int,
        op: str,
        tensor: Tensor,
        record: TensorRecord,
        conditioning: Array | float,
    ) -> None:
        wanted = _tensor_of(record)
        rows = _common_rows(tensor, wanted)
        if rows is None:
            shapes = f"{tuple(tensor.shape)} where {record.shape} was recorded"
            self._stop(number, op, record.name, f"gives {record.name} of shape {shapes}")
        got, ref = tensor[rows].detach().cpu(), wanted[rows]
        is_float = ref.is_floating_point()
        measured = compare_two(
            got.double().numpy(),
            ref.double().numpy(),
            dtype=record.dtype if is_float else "float32",
            tolerance=_TOLERANCES.get(op, "attention") if is_float else "exact",
            conditioning=conditioning,
        )
        summary = self._found.operators[op]
        summary.headroom = max(summary.headroom, measured.headroom)
        if not measured.is_within:
            message = (
                f"gives {record.name} off by {measured.error:.3g}; two devices that round honestly "
                f"differ by at most {measured.bound:.3g} here"
            )
            where = _place(measured.where, tuple(ref.shape))
            self._stop(number, op, record.name, message, headroom=measured.headroom, where=where)
        tensor[rows].copy_(ref)

    def _stop(
        self,
        number: int,
        op: str,
        output: str,
        message: str,
        *,
        headroom: float = float("inf"),
        where: str = "",
    ) -> None:
        layer = self._layers[number] if number < len(self._layers) else "head"
        self._found.operator_difference = OperatorDifference(
            step_id=self._step_id,
            layer=layer,
            op=op,
            number=number,
            output=output,
            headroom=headroom,
            where=where,
            message=message,
        )
        raise _Stopped


def _compare_operators(trace: Trace, device: Device, config: WorkerConfig, found: Replay) -> None:
    forcing = _Forcing(found)
    heard = tapped_device(device, forcing)
    with _worker(trace, device, config, heard) as (worker, _):
        for step in trace.steps:
            forcing.begin(step)
            try:
                worker.execute(step.batch)
            except Exception as error:
                if found.operator_difference is None:
                    raise _blame(step, error) from error
                return
            forcing.is_on = False


def _blame(step: TraceStep, error: Exception) -> QuireError:
    return QuireError(f"step {step.batch.step_id} could not be replayed: {error}")


def _compare_digests(trace: Trace, device: Device, config: WorkerConfig, found: Replay) -> None:
    log = OperatorLog(with_data=False)
    with _worker(trace, device, config, tapped_device(device, log)) as (worker, _):
        for step in trace.steps:
            log.is_on = True
            worker.execute(step.batch)
            log.is_on = False
            found.operator_difference = _first_digest(step, log.take(), found)
            if found.operator_difference is not None:
                return


def _first_digest(
    step: TraceStep, calls: Sequence[OperatorCall], found: Replay
) -> OperatorDifference | None:
    layers = layer_names([call.op for call in step.calls])
    for number, (recorded, ours) in enumerate(zip(step.calls, calls, strict=False)):
        found.operators.setdefault(recorded.op, OperatorSummary()).num_calls += 1
        digests = [r.digest for r in recorded.outputs]
        if recorded.op != ours.op or digests != [r.digest for r in ours.outputs]:
            return OperatorDifference(
                step_id=step.batch.step_id,
                layer=layers[number],
                op=recorded.op,
                number=number,
                output="",
                headroom=float("inf"),
                where="",
                message="gives other bits; a trace with tensors would tell whether it is rounding",
            )
    return None


def _tensor_of(record: TensorRecord) -> Tensor:
    dtype = getattr(torch, record.dtype)
    raw = np.frombuffer(record.data, np.uint8).copy()
    return torch.from_numpy(raw).view(dtype).reshape(record.shape)


def _common_rows(ours: Tensor, recorded: Tensor) -> slice | tuple[()] | None:
    """The rows that both have: a device may pad its steps. None: they are of different kinds."""
    if ours.dim() == 0 or recorded.dim() == 0:
        return () if ours.shape == recorded.shape else None
    if ours.shape[1:] != recorded.shape[1:]:
        return None
    return slice(0, min(len(ours), len(recorded)))


def _place(where: str, shape: tuple[int, ...]) -> str:
    """`row 37` of the rule as the index that a person looks up."""
    name, _, number = where.partition(" ")
    if name != "row" or len(shape) < 2:
        return where
    index = np.unravel_index(int(number), shape[:-1])
    return f"row [{', '.join(str(int(i)) for i in index)}] of {list(shape)}"
