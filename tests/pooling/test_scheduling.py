"""Texts that become numbers are computed whole, side by side with any others, and then are gone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import RequestError
from quire.core.interface.worker import (
    CachePlan,
    PooledNumbers,
    PoolingSpec,
    SamplingSpec,
    StepBatch,
    StepResult,
)
from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.request import FinishReason, RequestSpec
from quire.core.scheduler.scheduler import Scheduler
from quire.core.scheduler.settings import SchedulerSettings


def make_scheduler(*, tokens: int = 32, seats: int = 4, length: int = 32) -> Scheduler:
    cache = KVCacheManager([], CachePlan(num_blocks=[]))
    return Scheduler(
        SchedulerSettings(max_num_seqs=seats, max_num_batched_tokens=tokens, max_model_len=length),
        cache,
    )


def spec_of(name: str, num_tokens: int) -> RequestSpec:
    return RequestSpec(
        request_id=name,
        prompt_token_ids=[5] * num_tokens,
        sampling=SamplingSpec(),
        max_tokens=1,
        pooling=PoolingSpec(task="embed"),
    )


def answer(batch: StepBatch, errors: dict[str, str] | None = None) -> StepResult:
    errors = errors or {}
    return StepResult(
        step_id=batch.step_id,
        sampled_token_ids=[[] for _ in batch.request_ids],
        pooled={
            name: PooledNumbers(shape=[1], data=struct.pack("<f", count))
            for name, count in zip(batch.request_ids, batch.num_new_tokens, strict=True)
            if name not in errors
        },
        errors=errors,
    )


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 32), min_size=1, max_size=30),
    seats=st.integers(1, 5),
    bad=st.sets(st.integers(0, 29)),
    gone=st.sets(st.integers(0, 29)),
)
def test_every_text_is_computed_whole_once_and_answered(lengths, seats, bad, gone):
    """Whatever the lengths: no step is too large, no text is cut, none is forgotten."""
    scheduler = make_scheduler(seats=seats)
    for index, length in enumerate(lengths):
        scheduler.add(spec_of(str(index), length))
    aborted = scheduler.abort(str(index) for index in gone)
    ends = {update.request_id: update for update in aborted}
    seen: list[str] = []
    while scheduler.has_work():
        batch = scheduler.schedule()
        assert batch is not None
        assert batch.num_tokens <= 32
        assert len(batch.request_ids) <= seats
        assert [new.request_id for new in batch.new_requests] == batch.request_ids
        assert [len(new.token_ids) for new in batch.new_requests] == batch.num_new_tokens
        seen += batch.request_ids
        errors = {name: "no" for name in batch.request_ids if int(name) in bad}
        ends |= {
            update.request_id: update for update in scheduler.update(batch, answer(batch, errors))
        }
        scheduler.check_integrity()
    assert len(seen) == len(set(seen))
    assert len(ends) == len(lengths)
    for index, length in enumerate(lengths):
        update = ends[str(index)]
        if index in gone:
            assert update.finish_reason is FinishReason.ABORT
        elif index in bad:
            assert (update.finish_reason, update.error) == (FinishReason.ERROR, "no")
        else:
            assert update.pooled == PooledNumbers(shape=[1], data=struct.pack("<f", length))


def test_step_that_ran_out_of_memory_is_tried_again_in_smaller_ones():
    """The texts of a failed step come again, fewer at once."""
    scheduler = make_scheduler(seats=4)
    for index in range(4):
        scheduler.add(spec_of(str(index), 8))
    first = scheduler.schedule()
    assert first is not None
    assert scheduler.fail_step(first, "no memory") == []
    second = scheduler.schedule()
    assert second is not None
    assert len(second.request_ids) == 2
    assert [update.request_id for update in scheduler.update(second, answer(second))] == ["0", "1"]


def test_text_longer_than_a_step_is_refused():
    """Cut into chunks it would give other numbers without an error."""
    scheduler = make_scheduler(tokens=16, length=64)
    with pytest.raises(RequestError, match="17 tokens"):
        scheduler.add(spec_of("long", 17))
    scheduler.add(spec_of("fits", 16))


def test_worker_that_brings_no_numbers_is_an_error_of_the_request():
    """An answer is never made up."""
    scheduler = make_scheduler()
    scheduler.add(spec_of("a", 3))
    batch = scheduler.schedule()
    assert batch is not None
    empty = StepResult(step_id=batch.step_id, sampled_token_ids=[[]])
    (update,) = scheduler.update(batch, empty)
    assert update.finish_reason is FinishReason.ERROR
