"""The loop of schedule, execute, update on a worker without tensors."""

from __future__ import annotations

import cProfile

import pytest
from engine_fakes import (
    MAX_MODEL_LEN,
    FakeWorker,
    expected_tokens,
    make_fake_core,
    spec,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.engine.core import EngineCore
from quire.core.errors import DeviceLost, DeviceOutOfMemory, EngineDeadError
from quire.core.interface.worker import StepBatch
from quire.core.scheduler.request import FinishReason, RequestUpdate

PROMPTS = [list(range(4, 4 + length)) for length in (1, 3, 17, 40, 9)]


def run_all(core: EngineCore, *, max_steps: int = 2000) -> dict[str, list[RequestUpdate]]:
    """Steps until nothing is left; the books are checked after each."""
    updates: dict[str, list[RequestUpdate]] = {}
    for _ in range(max_steps):
        if not core.has_work():
            return updates
        for update in core.step():
            updates.setdefault(update.request_id, []).append(update)
        core.scheduler.check_integrity()
    raise AssertionError("the core does not come to an end")


def tokens_of(updates: list[RequestUpdate]) -> list[int]:
    return [token for update in updates for token in update.new_token_ids]


@pytest.mark.parametrize("overlap", [False, True])
def test_step_until_done_gives_each_request_its_own_tokens(overlap):
    """Batching, chunking and overlap change nothing about what a request gets."""
    core = make_fake_core(overlap_scheduling=overlap)
    for index, prompt in enumerate(PROMPTS):
        core.add(spec(str(index), prompt, max_tokens=5 + index))
    updates = run_all(core)
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(updates[str(index)]) == expected_tokens(prompt, 5 + index)
        assert updates[str(index)][-1].finish_reason is FinishReason.LENGTH
    assert core.statistics().num_finished == len(PROMPTS)
    assert core.statistics().num_output_tokens == sum(5 + index for index in range(len(PROMPTS)))


def test_step_overlap_submits_next_step_before_waiting_for_this_one():
    """An asynchronous device always has its next step ready."""
    worker = FakeWorker(is_asynchronous=True)
    core = make_fake_core(worker, overlap_scheduling=True)
    core.add(spec("a", [5, 6, 7], max_tokens=4))
    run_all(core)
    assert worker.log.index("submit 1") < worker.log.index("wait 0")
    assert worker.log.index("submit 2") < worker.log.index("wait 1")


def test_step_without_overlap_waits_before_it_schedules():
    """A synchronous device gets no step that builds on tokens nobody knows."""
    worker = FakeWorker(is_asynchronous=True)
    core = make_fake_core(worker, overlap_scheduling=False)
    core.add(spec("a", [5, 6, 7], max_tokens=4))
    run_all(core)
    assert worker.log.index("wait 0") < worker.log.index("submit 1")


@settings(max_examples=60, deadline=None)
@given(
    overlap=st.booleans(),
    aborts=st.dictionaries(st.integers(0, 4), st.integers(0, 14), max_size=4),
)
def test_abort_at_any_moment_harms_no_other_request(overlap, aborts):
    """Whoever leaves, and whenever, the others get the tokens that they would get alone."""
    core = make_fake_core(overlap_scheduling=overlap, max_num_seqs=3)
    for index, prompt in enumerate(PROMPTS):
        core.add(spec(str(index), prompt, max_tokens=6))
    updates: dict[str, list[RequestUpdate]] = {}
    for step in range(2000):
        for index, moment in aborts.items():
            if moment == step:
                core.abort([str(index), "unknown"])
        if not core.has_work():
            break
        for update in core.step():
            updates.setdefault(update.request_id, []).append(update)
        core.scheduler.check_integrity()
    for index, prompt in enumerate(PROMPTS):
        got = tokens_of(updates.get(str(index), []))
        wanted = expected_tokens(prompt, 6)
        if index in aborts:
            assert got == wanted[: len(got)]
        else:
            assert got == wanted


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_step_out_of_memory_is_tried_again_and_tokens_stay(overlap, step):
    """A refused allocation costs time, never a token."""
    failed: list[int] = []

    def fail_once(batch: StepBatch) -> None:
        if batch.step_id >= step and not failed:
            failed.append(batch.step_id)
            raise DeviceOutOfMemory("no room")

    worker = FakeWorker(before_step=fail_once, is_asynchronous=overlap)
    core = make_fake_core(worker, overlap_scheduling=overlap)
    for index, prompt in enumerate(PROMPTS):
        core.add(spec(str(index), prompt, max_tokens=6))
    updates = run_all(core)
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(updates[str(index)]) == expected_tokens(prompt, 6)
    assert core.statistics().num_failed_steps == 1


def test_step_out_of_memory_while_another_runs_waits_for_that_one():
    """A device with room for one step at a time still gives every request all its tokens."""
    worker = FakeWorker(is_asynchronous=True)

    def refuse_second(batch: StepBatch) -> None:
        if worker.pending:
            raise DeviceOutOfMemory("one step at a time")

    worker.before_submit = refuse_second
    core = make_fake_core(worker, overlap_scheduling=True)
    for index, prompt in enumerate(PROMPTS):
        core.add(spec(str(index), prompt, max_tokens=6))
    updates = run_all(core)
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(updates[str(index)]) == expected_tokens(prompt, 6)


def test_step_request_that_never_fits_the_device_fails_and_core_lives_on():
    """One request that the device cannot hold ends with the reason; the next one finishes."""

    def refuse(batch: StepBatch) -> None:
        if "heavy" in batch.request_ids:
            raise DeviceOutOfMemory("no room for heavy")

    core = make_fake_core(FakeWorker(before_step=refuse))
    core.add(spec("heavy", list(range(4, 24)), max_tokens=3))
    updates = run_all(core)
    core.add(spec("light", [5, 6], max_tokens=3))
    updates |= run_all(core)
    assert tokens_of(updates["light"]) == expected_tokens([5, 6], 3)
    last = updates["heavy"][-1]
    assert (last.finish_reason, "no room for heavy" in (last.error or "")) == (
        FinishReason.ERROR,
        True,
    )


@pytest.mark.parametrize("error", [DeviceLost("gone"), ZeroDivisionError("a bug")])
@pytest.mark.parametrize("overlap", [False, True])
def test_step_worker_failure_kills_core_with_root_cause(error, overlap):
    """After a failure that is not memory every call says the same, with the cause."""

    def fail(batch: StepBatch) -> None:
        if batch.step_id == 2:
            raise error

    core = make_fake_core(
        FakeWorker(before_step=fail, is_asynchronous=overlap), overlap_scheduling=overlap
    )
    core.add(spec("a", [5, 6, 7]))
    with pytest.raises(EngineDeadError) as caught:
        run_all(core)
    assert caught.value.root_cause == f"{type(error).__name__}: {error}"
    assert caught.value.__cause__ is error
    with pytest.raises(EngineDeadError):
        core.step()
    with pytest.raises(EngineDeadError):
        core.health()
    core.close()


def test_step_interrupted_in_the_middle_leaves_a_dead_core():
    """Ctrl-C inside a step may leave books and device apart; going on would be wrong."""

    def interrupt(batch: StepBatch) -> None:
        raise KeyboardInterrupt

    core = make_fake_core(FakeWorker(before_step=interrupt))
    core.add(spec("a", [5]))
    with pytest.raises(KeyboardInterrupt):
        core.step()
    with pytest.raises(EngineDeadError, match="interrupted"):
        core.step()


def test_add_refused_request_ends_with_its_reason_in_an_update():
    """What the scheduler cannot take reaches its user, and nobody else."""
    core = make_fake_core(num_blocks=8)
    core.add(spec("small", [5, 6], max_tokens=4))
    core.add(spec("large", list(range(4, 104)), max_tokens=8))
    updates = run_all(core)
    assert tokens_of(updates["small"]) == expected_tokens([5, 6], 4)
    (refusal,) = updates["large"]
    assert refusal.finish_reason is FinishReason.ERROR
    assert "cache" in (refusal.error or "")


def test_add_id_in_use_leaves_first_request_alone():
    """A second request of the same id is refused; the first one goes on."""
    core = make_fake_core()
    core.add(spec("a", [5, 6], max_tokens=4))
    core.add(spec("a", [9], max_tokens=4))
    updates = run_all(core)["a"]
    assert [u.finish_reason for u in updates].count(FinishReason.ERROR) == 1
    assert tokens_of(updates) == expected_tokens([5, 6], 4)


def test_reset_prefix_cache_computes_prompt_anew():
    """After a reset nothing of an earlier prompt is reused."""
    core = make_fake_core()
    prompt = list(range(4, 24))
    cached = []
    for request_id in ("first", "again", "after"):
        if request_id == "after":
            assert core.reset_prefix_cache()
        core.add(spec(request_id, prompt, max_tokens=2))
        cached.append(run_all(core)[request_id][0].num_cached_tokens)
    assert cached[0] == 0
    assert cached[1] > 0
    assert cached[2] == 0


def test_close_twice_closes_worker_once():
    """Whoever closes in a finally need not know who closed before."""
    worker = FakeWorker()
    core = make_fake_core(worker)
    core.close()
    core.close()
    assert worker.log.count("close") == 1


def test_step_calls_few_functions_for_each_token():
    """Work that slips into the path of every token shows as calls; `benchmarks/` times it."""
    core = make_fake_core(
        SilentWorker(), num_blocks=4096, max_num_seqs=64, max_num_batched_tokens=2048
    )
    for index in range(64):
        core.add(spec(str(index), [5 + index], max_tokens=MAX_MODEL_LEN - 8))
    core.step()
    num_tokens, profile = 0, cProfile.Profile()
    profile.enable()
    while core.has_work():
        num_tokens += len(core.step())
    profile.disable()
    assert sum(entry.callcount for entry in profile.getstats()) / num_tokens < 30


class SilentWorker(FakeWorker):
    """Answers 5 without looking."""

    def submit(self, batch):
        from quire.core.interface.worker import CompletedStep, StepResult

        tokens = [[5] if samples else [] for samples in batch.samples]
        return CompletedStep(StepResult(step_id=batch.step_id, sampled_token_ids=tokens))

    def execute(self, batch):
        return self.submit(batch).result()
