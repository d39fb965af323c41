"""What a worker's process begins with in tests: a fake worker, or one on a tiny model, that fails as `options` say."""

from __future__ import annotations

import os
import sys

from engine_fakes import START_FAULTS, FakeWorker, _fail, _pause, model_info

from quire.core.config import EngineConfig
from quire.core.engine.facts import PlanFacts
from quire.core.executor.in_process import InProcessExecutor
from quire.core.interface.worker import ModelInfo, StepBatch


class LoadingWorker(FakeWorker):
    """Says what it does on stderr, and may end its process while it loads."""

    def __init__(self, config: EngineConfig) -> None:
        self.options = config.options
        at = int(config.options.get("fake.at", "3"))
        fault = config.options.get("fake.step")

        def before_step(batch: StepBatch) -> None:
            if fault is not None and batch.step_id == at:
                _say("the driver says: goodbye")
                _fail(fault)

        def before_submit(batch: StepBatch) -> None:
            if str(batch.step_id) in config.options.get("fake.refuse", "").split(","):
                _fail("oom")

        super().__init__(
            before_step=before_step,
            before_submit=before_submit,
            is_asynchronous=bool(config.overlap_scheduling),
        )

    def load_model(self) -> ModelInfo:
        fault = self.options.get("fake.load")
        if fault == "segfault":
            _say("loading layer 3 of 8")
            os.abort()
        if fault == "wait":
            _say("loading")
            _pause(600.0)
        if fault is not None:
            raise START_FAULTS[fault]
        return model_info()

    def memory_by_tag(self) -> dict[str, int]:
        return {"weights": 1, "pid": os.getpid()}


def start_fake_worker(config: EngineConfig) -> tuple[PlanFacts, InProcessExecutor]:
    """For the process of a worker."""
    if (fault := config.options.get("fake.start")) is not None:
        raise START_FAULTS[fault]
    facts = PlanFacts(
        config=config,
        model_directory=config.model,
        device="fake",
        device_name="a fake",
        kernels={},
        changes=[],
    )
    return facts, InProcessExecutor(LoadingWorker(config))


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{text}\n".encode())
