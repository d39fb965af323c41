"""What an engine asks of the workers that run its model, however many and wherever they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from quire.core.interface.worker import CachePlan, ModelInfo, PendingStep, StepBatch, StepResult


class Executor(ABC):
    """All workers of one model as one.

    Used by one thread, in the order of `quire.core.interface.worker.Worker`.
    """

    @abstractmethod
    def load_model(self) -> ModelInfo:
        """Loads the weights on every worker.

        Raises: CheckpointError, UnsupportedError, DeviceOutOfMemory.
        """

    @abstractmethod
    def cache_budget_bytes(self) -> int:
        """Bytes that each worker's cache may take: what the poorest of them has."""

    @abstractmethod
    def allocate_cache(self, plan: CachePlan) -> None:
        """Allocates the same blocks on every worker. Raises: DeviceOutOfMemory."""

    @abstractmethod
    def warm_up(self) -> None:
        """Runs what the first real steps would otherwise wait for."""

    def warm_up_more(self) -> bool:
        """Does one more piece of what `warm_up` left for later; whether there are others.

        Raises: DeviceLost.
        """
        return False

    @abstractmethod
    def submit(self, batch: StepBatch) -> PendingStep:
        """Starts one step.

        Steps complete in the order of submission. Raises as `PendingStep.result` does.
        """

    def execute(self, batch: StepBatch) -> StepResult:
        """Runs one step and waits for it.

        Raises: DeviceOutOfMemory (the step did not happen), DeviceLost, DeviceError.
        """
        return self.submit(batch).result()

    @abstractmethod
    def register_logits_processor(self, name: str, function: Any) -> None:
        """Makes a function known under a name that requests may use.

        Raises: RequestError if the worker takes none.
        """

    @abstractmethod
    def health(self) -> None:
        """Returns if every worker can run steps. Raises: DeviceLost."""

    @abstractmethod
    def memory_by_tag(self) -> dict[str, int]:
        """Bytes held by `weights`, `cache`, ..., of all workers together, where known."""

    def watch(self, on_lost: Callable[[], None]) -> None:  # noqa: B027 - optional
        """Has `on_lost` called, from any thread, when a worker is gone while nobody asks it.

        Never called where workers live and die with the engine. `health` tells why.
        """

    @abstractmethod
    def close(self) -> None:
        """Releases workers and devices. Calling twice is harmless."""
