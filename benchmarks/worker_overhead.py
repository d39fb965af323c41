"""What the worker costs on the host: a device whose queue drops the work, so all time is ours.

python benchmarks/worker_overhead.py
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from quire.backends.reference import TorchDevice
from quire.benchmarks.recording import Measurement, Record
from quire.benchmarks.shapes import SHAPES
from quire.core.config import EngineConfig
from quire.core.executor.executor import Executor
from quire.core.executor.in_process import InProcessExecutor
from quire.core.executor.worker_process import WorkerProcess
from quire.core.interface import (
    CachePlan,
    Capabilities,
    DeviceInfo,
    ImmediateQueue,
    NewRequest,
    SamplingSpec,
    StepBatch,
    WorkerConfig,
)
from quire.core.worker.worker import DefaultWorker

BLOCK_SIZE = 16
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "logprobs 5": {"num_logprobs": 5},
}


PLACES = {False: "quire", True: "quire, worker process"}
"""Whether the worker has a process of its own, and what that is called."""


class Nothing(msgspec.Struct):
    """What a worker's process has to tell at its start."""


class DroppingQueue(ImmediateQueue):
    """Does no work: every token is 0."""

    def run(self, work: Callable[[], None]) -> None:
        """Clears what the step would have written."""
        for tensor in work.out.values():  # type: ignore[attr-defined]  # the worker's own StepWork
            tensor.zero_()


class IdleDevice(TorchDevice):
    """Host memory, and a queue that drops its work."""

    def __init__(self) -> None:
        super().__init__(
            info=DeviceInfo(index=0, name="idle"),
            capabilities=Capabilities(copy_mode="unified"),
        )
        self._queue = DroppingQueue()

    def queue(self) -> DroppingQueue:
        """The queue that drops."""
        return self._queue


def main(
    running: Annotated[int, typer.Option(help="requests that run at once")] = 64,
    prompt: Annotated[int, typer.Option(help="tokens of each prompt")] = 500,
    steps: Annotated[int, typer.Option(help="decode steps of each round")] = 200,
    rounds: Annotated[int, typer.Option()] = 5,
    out: Annotated[Path | None, typer.Option(help="JSON to write")] = None,
) -> None:
    """Prints microseconds of the worker's own time for a decode step, median of each round."""
    record = Record(
        name=f"worker_overhead_{running}",
        settings={"running": running, "prompt": prompt, "steps": steps, "rounds": rounds},
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SHAPES["llama-15m"]))
        for name, settings in SETTINGS.items():
            spec = SamplingSpec(**settings)
            # In turns, so that a machine that changes its pace changes it for both.
            values = [
                [_median_us(folder, running, prompt, steps, spec, is_apart) for is_apart in PLACES]
                for _ in range(rounds)
            ]
            for subject, column in zip(PLACES.values(), zip(*values, strict=True), strict=True):
                record.measurements.append(
                    Measurement(work=name, subject=subject, unit="us a step", values=column)
                )
    record.show()
    print(f"written to {record.write(out)}")


def _median_us(
    folder: str, running: int, prompt: int, steps: int, spec: SamplingSpec, is_apart: bool
) -> float:
    """The middle of the times of all decode steps, submission to result."""
    executor = _start(folder, running, prompt + steps + 2, is_apart)
    times = []
    for batch in _batches(running, prompt, steps, spec):
        begin = time.perf_counter()
        executor.execute(batch)
        times.append(time.perf_counter() - begin)
    executor.close()
    return sorted(times[1:])[steps // 2] * 1e6  # the first one is the prefill


def _start(folder: str, running: int, max_model_len: int, is_apart: bool) -> Executor:
    config = EngineConfig(
        model=folder,
        max_num_seqs=running,
        max_model_len=max_model_len,
        max_num_batched_tokens=running * max_model_len,
    )
    executor: Executor
    if is_apart:
        executor = process = WorkerProcess(start_idle_worker, config)
        process.started(Nothing)
    else:
        _, executor = start_idle_worker(config)
    executor.load_model()
    executor.allocate_cache(CachePlan(num_blocks=[2]))
    return executor


def start_idle_worker(config: EngineConfig) -> tuple[Nothing, Executor]:
    """The core's own worker on an idle device, here or in the process that calls this."""
    worker_config = WorkerConfig(
        model=config.model,
        dtype="float32",
        cache_dtype="float32",
        block_size=BLOCK_SIZE,
        max_model_len=config.max_model_len or 0,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        device_memory_fraction=0.5,
        load_format="dummy",
    )
    return Nothing(), InProcessExecutor(DefaultWorker(IdleDevice(), worker_config))


def _batches(running: int, prompt: int, steps: int, spec: SamplingSpec) -> Iterator[StepBatch]:
    """A prefill of all requests, then decode steps; blocks come when the last one is full."""
    names = [f"request-{index}" for index in range(running)]
    # Lengths differ, so that blocks fill up in different steps, as in life.
    lengths = [prompt - index % BLOCK_SIZE for index in range(running)]
    yield StepBatch(
        step_id=0,
        finished_request_ids=[],
        new_requests=[
            NewRequest(
                request_id=name,
                token_ids=list(range(length)),
                num_prompt_tokens=length,
                num_computed_tokens=0,
                block_ids=[[1] * -(-length // BLOCK_SIZE)],
                sampling=spec,
            )
            for name, length in zip(names, lengths, strict=True)
        ],
        request_ids=names,
        num_new_tokens=lengths,
        num_computed_tokens=[0] * running,
        new_block_ids=[None] * running,
        samples=[True] * running,
    )
    for step in range(steps):
        yield StepBatch(
            step_id=step + 1,
            finished_request_ids=[],
            new_requests=[],
            request_ids=names,
            num_new_tokens=[1] * running,
            num_computed_tokens=[length + step for length in lengths],
            new_block_ids=[
                [[1]] if (length + step) % BLOCK_SIZE == 0 else None for length in lengths
            ],
            samples=[True] * running,
        )


if __name__ == "__main__":
    typer.run(main)
