"""What the engine does when a device fails: no request is lost without an error, no block leaks."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from tiny_models import make_tiny_model

from quire import LLM, AsyncEngine, SamplingParams
from quire.core.config import EngineConfig
from quire.core.errors import ConfigError, DeviceOutOfMemory, EngineDeadError, UnsupportedError
from quire.core.outputs import RequestOutput

LENGTHS = (3, 20, 40, 9)
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + length))} for length in LENGTHS]
"""Each is the beginning of the longest: they would share blocks, were one full."""
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
DEVICES = ("faults:0", "faults:1")
SETTINGS = {"dtype": "float32", "max_model_len": 128, "cache_memory_bytes": 1 << 21}
LOST = "lost on purpose in step 4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    """The tokens of a device that does not fail."""
    with started(model) as llm:
        return tokens_of(run(llm))


@contextmanager
def started(model: Path, device: str = "faults:0", **faults: object) -> Iterator[LLM]:
    """An engine in this process whose device fails so."""
    settings = {**SETTINGS, **faults.pop("settings", {})}
    with LLM(model=str(model), device=device, options=options(faults), **settings) as llm:
        yield llm


def options(faults: dict[str, object]) -> dict[str, str]:
    return {f"faults.{name}": str(value) for name, value in faults.items()}


def run(llm: LLM) -> list[RequestOutput]:
    return llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def hold_nothing_left(llm: LLM) -> None:
    """No request and no block is still held by anybody."""
    core = llm._client._core
    while core.has_work():  # a step that was under way when its requests ended
        assert core.step() == []
    core.scheduler.check_integrity()
    numbers = llm.statistics()
    assert (numbers.num_running, numbers.num_waiting, numbers.cache_usage) == (0, 0, 0)


# --- out of memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("steps", ["1", "2", "5", "1,2,3", "4,6,8"])
def test_out_of_memory_in_a_step_changes_no_token_and_leaks_no_block(
    model: Path, expected: list[list[int]], device: str, steps: str
) -> None:
    """The step is repeated smaller until it fits."""
    with started(model, device, oom_at_step=steps) as llm:
        assert tokens_of(run(llm)) == expected
        num_faults = len(steps.split(","))
        # A step behind one that failed is dropped with it, and its own fault is not seen.
        least = num_faults if device == "faults:0" else 1
        assert least <= llm.statistics().num_failed_steps <= num_faults
        hold_nothing_left(llm)


@pytest.mark.parametrize("device", DEVICES)
def test_out_of_memory_for_ever_ends_every_request_with_its_error(model: Path, device: str) -> None:
    """A request that does not fit alone ends with the reason; nobody waits for ever."""
    with started(model, device, oom_at_step="3+") as llm:
        outputs = run(llm)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error"] * len(PROMPTS)
        assert all("refused on purpose" in str(output.error) for output in outputs)
        hold_nothing_left(llm)


# --- broken numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("step", [1, 4])
def test_nan_logits_end_that_request_alone(
    model: Path, expected: list[list[int]], device: str, step: int
) -> None:
    """One request has the error; the tokens of the others are those of a healthy device."""
    with started(model, device, nan_logits_at_step=step) as llm:
        outputs = run(llm)
        errors = [output.error for output in outputs]
        (broken,) = [index for index, error in enumerate(errors) if error]
        assert "NaN" in str(errors[broken])
        for index, output in enumerate(outputs):
            if index != broken:
                assert list(output.outputs[0].token_ids) == expected[index], index
        kept = list(outputs[broken].outputs[0].token_ids)
        assert kept == expected[broken][: len(kept)]
        hold_nothing_left(llm)
        assert tokens_of(run(llm)) == expected  # the engine serves on


@pytest.mark.parametrize("device", DEVICES)
def test_corrupt_page_of_nan_ends_its_reader_and_poisons_no_later_request(
    model: Path, device: str
) -> None:
    """The page is found out by the logits; it is not handed to others that begin alike."""
    prompt = {"prompt_token_ids": list(range(5, 50))}
    with started(model, device) as llm:
        (whole,) = tokens_of(llm.generate([prompt], PARAMS, use_tqdm=False))
    with started(model, device, corrupt_block_at_step=3) as llm:
        (first,) = llm.generate([prompt], PARAMS, use_tqdm=False)
        assert "NaN" in str(first.error)
        hold_nothing_left(llm)
        (second,) = llm.generate([prompt], PARAMS, use_tqdm=False)
        assert second.error is None
        assert list(second.outputs[0].token_ids) == whole


def test_corrupt_page_of_finite_numbers_is_not_detected(model: Path) -> None:
    """What the engine cannot see: nothing checks that finite numbers in a page are the right ones.

    The documentation says so; this holds it to the truth, and that other requests are unharmed.
    """
    prompts = [{"prompt_token_ids": [start, *range(30, 60)]} for start in (5, 6, 7)]
    with started(model) as llm:
        expected = tokens_of(llm.generate(prompts, PARAMS, use_tqdm=False))
    with started(model, corrupt_block_at_step=3, corrupt_with="noise") as llm:
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        assert [output.error for output in outputs] == [None] * len(prompts)
        wrong = [a != b for a, b in zip(tokens_of(outputs), expected, strict=True)]
        assert sum(wrong) == 1
        hold_nothing_left(llm)


# --- a device that is gone ------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_device_lost_ends_all_with_one_typed_error_and_refuses_the_rest(
    model: Path, device: str
) -> None:
    """Whoever waits and whoever comes later is told the same root cause."""
    with started(model, device, lost_at_step=4) as llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=LOST) as raised:
                run(llm)
            assert raised.value.root_cause.startswith("DeviceLost")


def test_device_lost_in_another_process_ends_all_with_its_cause(model: Path) -> None:
    """The cause crosses the processes; closing afterwards is harmless."""
    llm = LLM(
        model=str(model),
        device="faults",
        has_own_process=True,
        options=options({"lost_at_step": 4}),
        **SETTINGS,
    )
    with llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=LOST):
                run(llm)
        with pytest.raises(EngineDeadError, match=LOST):
            llm.statistics()


@asynccontextmanager
async def started_async(model: Path, **faults: object) -> AsyncIterator[AsyncEngine]:
    settings = {**SETTINGS, **faults.pop("settings", {})}
    config = EngineConfig(model=str(model), device="faults", options=options(faults), **settings)
    engine = await AsyncEngine.start(config)
    try:
        yield engine
    finally:
        await engine.shutdown()


async def consume(engine: AsyncEngine, index: int) -> str:
    """The root cause with which one stream ends."""
    prompt = PROMPTS[index % len(PROMPTS)]
    try:
        async for _ in engine.generate(prompt, PARAMS, f"stream-{index}"):
            pass
    except EngineDeadError as error:
        return error.root_cause
    return "ended as if nothing had happened"


def test_step_that_hangs_ends_the_process_with_the_reason(model: Path) -> None:
    """With a limit nobody waits for ever; where the step hung is in the error's notes."""
    llm = LLM(
        model=str(model),
        device="faults",
        has_own_process=True,
        step_timeout_s=2.0,
        options=options({"hang_at_step": 4, "hang_s": 600}),
        **SETTINGS,
    )
    with llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="longer than step_timeout_s") as raised:
                run(llm)
            assert raised.value.root_cause.startswith("StepTimeout")
            assert "faults/queue.py" in "".join(raised.value.__notes__)


async def test_step_that_hangs_under_streams_tells_each_the_reason(model: Path) -> None:
    """A server's streams end too."""
    faults = {"hang_at_step": 4, "hang_s": 600, "settings": {"step_timeout_s": 2.0}}
    async with started_async(model, **faults) as engine, asyncio.timeout(60):
        causes = await asyncio.gather(*(consume(engine, index) for index in range(4)))
        assert all(cause.startswith("StepTimeout") for cause in causes), causes


def test_step_limit_without_a_process_of_its_own_is_refused(model: Path) -> None:
    """What could not be kept is not promised."""
    with (
        pytest.raises(ConfigError, match="has_own_process=True"),
        started(model, settings={"step_timeout_s": 2.0}),
    ):
        pass


async def test_device_lost_under_many_streams_tells_each_the_same_cause(model: Path) -> None:
    """Every stream ends with the one typed error; so does the request after it."""
    async with started_async(model, lost_at_step=4) as engine:
        async with asyncio.timeout(60):
            causes = await asyncio.gather(*(consume(engine, index) for index in range(8)))
            causes.append(await consume(engine, 8))
        assert len(set(causes)) == 1
        assert LOST in causes[0]


# --- before serving -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["oom_at_load", "oom_at_allocate"])
@pytest.mark.parametrize("has_own_process", [False, True], ids=["in_process", "own_process"])
def test_out_of_memory_before_serving_is_typed_and_ends_the_start(
    model: Path, fault: str, has_own_process: bool
) -> None:
    """No engine comes up half; the process of its own is gone with the error."""
    with pytest.raises(DeviceOutOfMemory, match="refused on purpose"):
        LLM(
            model=str(model),
            device="faults",
            has_own_process=has_own_process,
            options=options({fault: 1}),
            **SETTINGS,
        )
    assert not multiprocessing.active_children()


def test_slow_copies_change_no_token(model: Path, expected: list[list[int]]) -> None:
    """Only slower."""
    for device in DEVICES:
        with started(model, device, slow_copies_ms=2) as llm:
            assert tokens_of(run(llm)) == expected
            hold_nothing_left(llm)


@pytest.mark.parametrize(
    ("name", "value"), [("oom_at_step", "soon"), ("oops_at_step", "3"), ("corrupt_with", "love")]
)
def test_option_that_is_none_is_refused_with_what_is_known(
    model: Path, name: str, value: str
) -> None:
    """A typing error must not test nothing."""
    with (
        pytest.raises(UnsupportedError, match=rf"faults\.{name}={value}.*faults\.oom_at_step"),
        started(model, **{name: value}),
    ):
        pass
