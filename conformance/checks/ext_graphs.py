"""Extension `graphs`: a recorded decode step, replayed with new data, is the step itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quire.conformance.cases import check, dtypes
from quire.conformance.checks.l2_runner import Runner, running
from quire.conformance.stepping import Job
from quire.conformance.trial import Finding, Trial
from quire.core.interface import (
    Capabilities,
    CapturedStep,
    Device,
    GraphCapture,
    SamplingSpec,
)

_DTYPES = dtypes("float32", "bfloat16")
_SAMPLING = SamplingSpec(temperature=0.0, num_logprobs=3)
_NUM_OUTPUT = 10
_LENGTHS = (19, 3, 40, 16)


def _needs(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if claims.step_mode != "capture":
        return f"step_mode is {claims.step_mode!r}: no step is recorded"
    if arguments["dtype"] not in claims.cache_dtypes:
        return f"cache dtype {arguments['dtype']} is not claimed"
    return ""


class _CountedStep(CapturedStep):
    def __init__(self, owner: _CountedGraphs, inner: CapturedStep) -> None:
        self._owner = owner
        self._inner = inner

    def replay(self) -> None:
        self._owner.num_replays += 1
        self._inner.replay()


class _CountedGraphs(GraphCapture):
    """The device's own recordings, and how often they were replayed."""

    def __init__(self, inner: GraphCapture) -> None:
        self.num_replays = 0
        self._inner = inner

    def capture(self, key: str, step: Callable[[], None]) -> CapturedStep:
        return _CountedStep(self, self._inner.capture(key, step))

    def release(self) -> None:
        self._inner.release()


def _variant(device: Device, **attributes: Any) -> Device:
    """The same device with other answers; what it holds is shared."""
    other = copy.copy(device)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def _eager(device: Device) -> Device:
    return _variant(device, capabilities=replace(device.capabilities, step_mode="eager"))


def _sizes(trial: Trial) -> list[int]:
    """Numbers of requests that need no padding: with padding an eager step is another step."""
    buckets = trial.capabilities.request_buckets or (1, 2, 4)
    return [size for size in buckets if size <= len(_LENGTHS)] or [1]


def _decode(runner: Runner, prompts: Sequence[list[int]]) -> list[Job]:
    """The prompts, all in one step or chunk by chunk, and then decoded together."""
    steps = runner.steps()
    jobs = [
        steps.add(f"r{number}", prompt, _NUM_OUTPUT, _SAMPLING)
        for number, prompt in enumerate(prompts)
    ]
    steps.run()
    return jobs


@check(level=2, op="graphs", over=_DTYPES, needs=_needs, on_torch=True)
def replay_equals_eager(trial: Trial, *, dtype: str) -> None:
    """Replayed decode steps give what eager ones give: to the bit where repeats are claimed."""
    inner = trial.device.graphs()
    trial.require(inner is not None, "step_mode claims recordings and Device.graphs() is None")
    assert inner is not None
    graphs = _CountedGraphs(inner)
    recorded = _variant(trial.device, graphs=lambda: graphs)
    with (
        running(trial, dtype, recorded) as replays,
        running(trial, dtype, _eager(recorded)) as eager,
    ):
        for size in _sizes(trial):
            prompts = [replays.prompt(length) for length in _LENGTHS[:size]]
            before = graphs.num_replays
            theirs = _decode(eager, prompts)
            try:
                ours = _decode(replays, prompts)
            except Finding as finding:
                raise Finding(f"replayed decode steps of {size} requests: {finding}") from finding
            trial.require(
                graphs.num_replays > before,
                f"step_mode is {trial.capabilities.step_mode!r} and no decode step of {size} "
                "requests was replayed",
            )
            for one, other in zip(ours, theirs, strict=True):
                _hold_same(trial, replays, one, other, size)


def _hold_same(trial: Trial, runner: Runner, one: Job, other: Job, size: int) -> None:
    runner.hold_greedy(one, f"replayed decode steps of {size} requests")
    if trial.capabilities.determinism == "none":
        return
    ours, theirs = ([entry.logprob for entry in job.logprobs] for job in (one, other))
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    trial.require(
        at is None,
        f"among {size} requests, log-probability {at} of {one.request_id} is "
        f"{ours[at or 0]!r} from a recording and {theirs[at or 0]!r} eagerly: a device that claims "
        f"determinism {trial.capabilities.determinism!r} replays the same bits. Does recorded work "
        "read something else than the static buffers hold?",
    )


@check(level=2, op="graphs", over=_DTYPES, needs=_needs, on_torch=True)
def recordings_are_read_anew(trial: Trial, *, dtype: str) -> None:
    """A recording made once serves other tokens, lengths and blocks, again and again."""
    with running(trial, dtype, trial.device) as runner:
        for number in range(3):
            for size in _sizes(trial):
                prompts = [runner.prompt(length + 7 * number) for length in _LENGTHS[:size]]
                for job in _decode(runner, prompts):
                    what = f"use number {number + 1} of the recording of {size} requests"
                    runner.hold_greedy(job, what)
