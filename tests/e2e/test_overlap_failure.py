"""Steps that overlap on an asynchronous device, and one of them that does not happen."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from quire import LLM, SamplingParams
from quire.backends.sim.queue import DeferredQueue
from quire.core.errors import DeviceLost, DeviceOutOfMemory, EngineDeadError

PROMPTS = [{"prompt_token_ids": list(range(5, 5 + length))} for length in (3, 20, 40)]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


def _start(model: Path) -> LLM:
    return LLM(model=str(model), device="sim", dtype="float32", max_model_len=128)


def _tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


class _FailingQueue:
    """Makes the work number `at` of a queue raise instead of running."""

    def __init__(self, error: Exception, at: int) -> None:
        self.error = error
        self.left = at
        self.real_run = DeferredQueue.run

    def as_method(self):
        def run(queue: DeferredQueue, work) -> None:
            self.left -= 1
            self.real_run(queue, self._fail if self.left == 0 else work)

        return run

    def _fail(self) -> None:
        raise self.error


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_step_out_of_memory_is_repeated_and_changes_no_token(
    model: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The failed step and the one that was built on it are made again, smaller."""
    with _start(model) as llm:
        expected = _tokens(llm)
    with _start(model) as llm:
        failing = _FailingQueue(DeviceOutOfMemory("no room"), at)
        monkeypatch.setattr(DeferredQueue, "run", failing.as_method())
        assert _tokens(llm) == expected
        assert failing.left <= 0
        assert llm.statistics().num_failed_steps == 1


def test_device_lost_in_mid_step_ends_everything_with_its_cause(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One typed error that names the root cause, now and for every later request."""
    with _start(model) as llm:
        failing = _FailingQueue(DeviceLost("the board left the bus"), 4)
        monkeypatch.setattr(DeferredQueue, "run", failing.as_method())
        with pytest.raises(EngineDeadError, match="left the bus"):
            _tokens(llm)
        with pytest.raises(EngineDeadError, match="left the bus"):
            _tokens(llm)
