"""One worker, in the engine's own process and thread."""

from __future__ import annotations

from typing import Any

from quire.core.errors import RequestError
from quire.core.executor.executor import Executor
from quire.core.interface.backend import Device
from quire.core.interface.worker import (
    CachePlan,
    ModelInfo,
    PendingStep,
    StepBatch,
    StepResult,
    Worker,
    WorkerConfig,
)


class InProcessExecutor(Executor):
    """Passes every call on to its worker. Owns the worker and, if given, the device."""

    def __init__(self, worker: Worker, *, device: Device | None = None) -> None:
        self._worker = worker
        self._device = device
        self._is_closed = False

    def load_model(self) -> ModelInfo:
        """Loads the weights."""
        return self._worker.load_model()

    def cache_budget_bytes(self) -> int:
        """The worker's own answer."""
        return self._worker.cache_budget_bytes()

    def allocate_cache(self, plan: CachePlan) -> None:
        """Allocates the blocks."""
        self._worker.allocate_cache(plan)

    def warm_up(self) -> None:
        """Warms the worker up."""
        self._worker.warm_up()

    def warm_up_more(self) -> bool:
        """Lets the worker do one more piece."""
        return self._worker.warm_up_more()

    def submit(self, batch: StepBatch) -> PendingStep:
        """Starts one step."""
        return self._worker.submit(batch)

    def execute(self, batch: StepBatch) -> StepResult:
        """Runs one step."""
        return self._worker.execute(batch)

    def register_logits_processor(self, name: str, function: Any) -> None:
        """Hands a function to a worker that keeps a `logits_processors` registry."""
        registry = getattr(self._worker, "logits_processors", None)
        if registry is None:
            raise RequestError(
                f"the worker {type(self._worker).__name__} takes no logits processors; "
                "leave them out",
                param="logits_processors",
            )
        registry.register(name, function)

    def health(self) -> None:
        """Asks the worker."""
        self._worker.health()

    def memory_by_tag(self) -> dict[str, int]:
        """The worker's own answer."""
        return self._worker.memory_by_tag()

    def close(self) -> None:
        """Closes the worker, then its device."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._worker.close()
        finally:
            if self._device is not None:
                self._device.close()


def make_executor(device: Device, config: WorkerConfig) -> Executor:
    """The executor for a model on one device, which it owns from here on, also if it fails."""
    try:
        worker = device.make_worker(config) or _make_default_worker(device, config)
    except BaseException:
        device.close()
        raise
    return InProcessExecutor(worker, device=device)


def _make_default_worker(device: Device, config: WorkerConfig) -> Worker:
    # Here and not above: a device with a worker of its own needs neither this one nor torch.
    from quire.core.worker.worker import DefaultWorker

    return DefaultWorker(device, config)
