"""A worker in a process of its own, with real models: the same tokens, and what befalls it befalls nobody else."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path

import psutil
import pytest
from test_engine_answers import PARAMS, PROMPTS, SETTINGS, options, tokens_of
from tiny_models import make_tiny_model

from quire import LLM, AsyncEngine, SamplingParams
from quire.core.config import EngineConfig
from quire.core.errors import CheckpointError, DeviceLost, DeviceOutOfMemory, EngineDeadError
from quire.core.outputs import RequestOutput

DEADLINE_S = 100.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


def start(model: Path, device: str = "faults:0", **faults: object) -> LLM:
    settings = {**SETTINGS, "worker_process": True, **faults.pop("settings", {})}
    return LLM(model=str(model), device=device, options=options(faults), **settings)


def run(llm: LLM) -> list[RequestOutput]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def child_of(pid: int) -> int:
    """The child that computes, not multiprocessing's own."""
    (child,) = [
        one.pid for one in psutil.Process(pid).children() if "spawn_main" in " ".join(one.cmdline())
    ]
    return child


@pytest.mark.parametrize(
    "device", ["cpu", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sim", "faults:1"))]
)
def test_worker_process_changes_no_token(model: Path, device: str) -> None:
    """Greedy, seeded and with log-probabilities, in every backend: bit by bit as in one process."""
    params = [
        PARAMS,
        SamplingParams(max_tokens=9, seed=7, ignore_eos=True, detokenize=False, logprobs=3),
    ]

    def said(llm: LLM) -> list[object]:
        answers = [llm.generate(PROMPTS, one, use_tqdm=False) for one in params]
        return [tokens_of(answer) for answer in answers] + [
            [output.outputs[0].logprobs for output in answers[1]]
        ]

    with start(model, device, settings={"worker_process": False}) as llm:
        expected = said(llm)
    with start(model, device) as llm:
        assert said(llm) == expected
        assert llm.statistics().memory_bytes["weights"] > 0
        assert llm.facts.device_name


def last_token(prompt_ids: list[int], output_ids: list[int], logits: object) -> object:
    """A logits processor that leaves nothing but one token."""
    logits[:] = float("-inf")  # type: ignore[index]
    logits[77] = 0.0  # type: ignore[index]
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("way", ["named", "registered"])
def test_logits_processor_reaches_the_worker(model: Path, way: str) -> None:
    """By its name in the configuration, or as a function that has a place in a module."""
    settings = (
        {} if way == "registered" else {"logits_processors": {"one": f"{__name__}:last_token"}}
    )
    processor = last_token if way == "registered" else "one"
    with start(model, "cpu", settings=settings) as llm:
        params = SamplingParams(max_tokens=3, detokenize=False, logits_processors=[processor])
        (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
        assert list(output.outputs[0].token_ids) == [77] * 3


@pytest.mark.slow
@pytest.mark.parametrize("has_own_process", [False, True], ids=["in_process", "own_process"])
def test_device_lost_in_the_worker_ends_all_with_its_cause(
    model: Path, has_own_process: bool
) -> None:
    """The cause crosses one process, and two."""
    settings = {"has_own_process": has_own_process}
    with start(model, lost_at_step=4, settings=settings) as llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="lost on purpose in step 4") as raised:
                run(llm)
            assert raised.value.root_cause.startswith("DeviceLost")
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_out_of_memory_in_a_step_of_the_worker_changes_no_token(model: Path) -> None:
    """The step is repeated smaller until it fits."""
    with start(model, "cpu") as llm:
        expected = tokens_of(run(llm))
    with start(model, "faults:1", oom_at_step="2,5") as llm:
        assert tokens_of(run(llm)) == expected
        assert llm.statistics().num_failed_steps >= 1


@pytest.mark.slow
def test_step_that_hangs_in_the_worker_ends_it_with_the_reason(model: Path) -> None:
    """A limit needs no process of the core where the worker has its own; the place is in the notes."""
    settings = {"step_timeout_s": 2.0}
    with start(model, hang_at_step=4, hang_s=600, settings=settings) as llm:
        with pytest.raises(EngineDeadError, match="longer than step_timeout_s") as raised:
            run(llm)
        assert "faults/queue.py" in "".join(raised.value.__cause__.__notes__)
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["oom_at_load", "oom_at_allocate"])
@pytest.mark.parametrize("has_own_process", [False, True], ids=["in_process", "own_process"])
def test_out_of_memory_before_serving_is_typed_and_ends_the_start(
    model: Path, fault: str, has_own_process: bool
) -> None:
    """As without a process for the worker; no process stays behind."""
    with pytest.raises(DeviceOutOfMemory, match="refused on purpose"):
        start(model, settings={"has_own_process": has_own_process}, **{fault: 1})
    assert not multiprocessing.active_children()


def test_model_that_is_none_is_refused_as_in_one_process(tmp_path: Path) -> None:
    """What planning refuses is refused over there, and typed here."""
    (tmp_path / "config.json").write_text('{"architectures": ["NoModelAtAll"]}')
    with pytest.raises(CheckpointError):
        start(tmp_path)
    with pytest.raises(CheckpointError):
        start(tmp_path, settings={"worker_process": False})


@pytest.mark.slow
def test_worker_killed_while_nobody_asks_is_noticed_by_the_next_who_does(model: Path) -> None:
    """In the user's own process there is no loop: the next call tells, and every one after it."""
    with start(model, "cpu") as llm:
        run(llm)
        os.kill(child_of(os.getpid()), signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            run(llm)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            run(llm)


async def started_async(model: Path) -> AsyncEngine:
    config = EngineConfig(model=str(model), device="cpu", worker_process=True, **SETTINGS)
    return await AsyncEngine.start(config)


async def test_worker_killed_under_streams_tells_each_and_leaves_no_process(model: Path) -> None:
    """Everybody gets the typed error with the signal; the core ends too, and may be replaced."""
    engine = await started_async(model)
    core = child_of(os.getpid())
    worker = child_of(core)
    begun = asyncio.Event()

    async def consume(index: int) -> str:
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
        try:
            async for _ in engine.generate(PROMPTS[0], params, f"stream-{index}"):
                begun.set()
        except EngineDeadError as error:
            return error.root_cause
        return "ended"

    try:
        async with asyncio.timeout(DEADLINE_S):
            streams = [asyncio.create_task(consume(index)) for index in range(6)]
            await begun.wait()
            os.kill(worker, signal.SIGKILL)
            causes = await asyncio.gather(*streams)
        assert all(
            "killed by SIGKILL" in cause and DeviceLost.__name__ in cause for cause in causes
        )
    finally:
        await engine.shutdown()
    assert not psutil.pid_exists(worker)
    assert not multiprocessing.active_children()


async def test_worker_killed_while_the_engine_is_idle_is_noticed_at_once(model: Path) -> None:
    """Readiness hangs on it: an engine without requests still learns that its worker is gone."""
    engine = await started_async(model)
    try:
        os.kill(child_of(child_of(os.getpid())), signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            while not engine.errored:  # noqa: ASYNC110 - nobody asks, that is the point
                await asyncio.sleep(0)
        assert "SIGKILL" in str(engine.dead_error)
    finally:
        await engine.shutdown()


@pytest.mark.slow
async def test_core_killed_takes_its_worker_along(model: Path) -> None:
    """No orphan keeps the device's memory from the engine that is started next."""
    engine = await started_async(model)
    core = child_of(os.getpid())
    worker = psutil.Process(child_of(core))
    try:
        os.kill(core, signal.SIGKILL)
        worker.wait(DEADLINE_S)
    finally:
        await engine.shutdown()
