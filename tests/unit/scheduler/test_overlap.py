"""Several steps in flight, and steps that fail."""

from __future__ import annotations

import pytest

from quire.core.interface.worker import SamplingSpec, StepResult
from quire.core.scheduler.policy import SchedulingPolicy
from quire.core.scheduler.request import FinishReason


def columns(batch):
    return dict(zip(batch.request_ids, batch.num_new_tokens, strict=True))


# ---------------------------------------------------------------------------------- overlap


def test_next_step_is_scheduled_before_the_token_of_the_last_is_known(kit):
    """The device never waits for the host."""
    house = kit.house(depth=2)
    house.add(kit.spec("a", [1, 2, 3], 5))
    first, second = house.submit(), house.submit()
    assert (columns(first), columns(second)) == ({"a": 3}, {"a": 1})
    assert second.num_computed_tokens == [3]
    assert second.samples == [True]


def test_no_step_computes_past_the_length_that_is_known_in_advance(kit):
    """The last token needs no successor, so its step is not scheduled."""
    house = kit.house(depth=3)
    house.add(kit.spec("a", [1, 2, 3], 2))
    assert house.submit() is not None
    assert house.submit() is not None
    assert house.submit() is None
    house.run()
    assert len(house.batches) == 2


def test_result_after_the_end_is_thrown_away_and_blocks_wait_for_it(kit):
    """The device still writes to them."""
    house = kit.house(depth=2)
    [token] = kit.run_alone(kit.spec(max_tokens=1), 64).tokens
    house.add(kit.spec(max_tokens=9, eos_token_ids=(token,)))
    house.submit()
    house.submit()
    house.collect()
    assert house.stories["a"].reason is FinishReason.STOP
    assert house.cache.usage > 0
    assert house.scheduler.has_work()
    house.collect()
    assert house.cache.usage == 0
    house.check_empty()
    assert house.stories["a"].tokens == [token]


def test_abort_in_flight_keeps_the_blocks_until_the_steps_are_back(kit):
    """As above, from outside."""
    house = kit.house(depth=2)
    house.add(kit.spec("a", [1] * 5, 9))
    house.submit()
    house.submit()
    house.abort("a")
    assert house.cache.usage > 0
    house.collect()
    assert house.cache.usage > 0
    house.collect()
    house.check_empty()


def test_id_may_be_used_again_while_old_steps_are_in_flight(kit):
    """Results of the old request do not reach the new one."""
    house = kit.house(depth=2)
    house.add(kit.spec("a", [1] * 5, 9))
    house.submit()
    house.submit()
    house.abort("a")
    house.add(kit.spec("a", [2] * 3, 4))
    assert house.submit().finished_request_ids == ["a"]
    house.run()
    house.check_output(house.stories["a"])
    assert len(house.stories["a"].tokens) == 4


def test_preempted_request_takes_in_what_was_on_its_way(kit):
    """No token that was sampled is lost, and it does not resume before it is there."""
    house = kit.house(depth=2, num_blocks=(6,), enable_prefix_caching=False)
    house.add(kit.spec("a", [1] * 8, 12))
    house.add(kit.spec("b", [2] * 7, 8))
    house.run()
    story = house.stories["b"]
    assert story.last.num_preemptions == 1
    house.check_output(story)
    news = [new for batch in house.batches for new in batch.new_requests]
    resumed = [new for new in news if new.request_id == "b"][1]
    assert resumed.token_ids[7:] == story.tokens[: len(resumed.token_ids) - 7]


def test_nobody_is_preempted_while_blocks_are_on_their_way_back(kit):
    """The blocks of one that ended suffice; and those behind do not take them first."""
    house = kit.house(depth=2, num_blocks=(7,), enable_prefix_caching=False)
    stop = kit.run_alone(kit.spec("c", [3] * 3, 1), 64).tokens[0]
    house.add(kit.spec("a", [1] * 7, 4))
    house.add(kit.spec("b", [2] * 7, 4))
    house.add(kit.spec("c", [3] * 3, 9, eos_token_ids=(stop,)))
    house.submit()
    house.submit()
    house.collect()  # c has ended, its second step is in flight
    house.run()
    assert house.scheduler.statistics().num_preemptions == 0


def test_nobody_takes_the_blocks_for_which_another_one_waits(kit):
    """Else a prompt that needs several blocks would starve beside many that need one each."""

    class NoSpare(SchedulingPolicy):
        def num_spare_blocks(self, num_running):
            return 0

    house = kit.house(
        groups=[kit.group(window=8)],
        num_blocks=(40,),
        max_chunk_tokens=8,
        policy_object=NoSpare(),
    )
    scheduler, [pool] = house.scheduler, house.cache._pools
    scheduler.add(kit.spec("old", range(40), 2))
    scheduler.add(kit.spec("young", [5] * 4, 9))
    scheduler.add(kit.spec("gone", [3] * 3, 9))
    assert columns(scheduler.schedule()) == {"old": 8, "young": 4, "gone": 3}
    scheduler.abort(["gone"])
    scheduler.add(kit.spec("new", [6], 9))
    hoard = pool.allocate(pool.num_free - 1)
    assert scheduler.schedule() is None  # old needs two blocks; young and new could take the one
    pool.free(hoard[:1])
    assert columns(scheduler.schedule()) == {"old": 8}
    pool.free(hoard[1:])
    house.check()


def test_window_that_moves_waits_for_its_own_blocks_instead_of_being_preempted(kit):
    """A lone request in a cache that just holds it never starts over."""
    for depth in (1, 2, 3):
        house = kit.house(
            groups=[kit.group(window=6)],
            num_blocks=(1 + 3,),
            max_num_batched_tokens=2,
            depth=depth,
        )
        house.add(kit.spec("a", range(17), 30))
        house.run()
        assert house.stories["a"].last.num_preemptions == 0
        house.check_output(house.stories["a"])


def test_chunk_that_crosses_a_boundary_gets_the_block_behind_the_window(kit):
    """Blocks that died in the middle of a block are given back before more are asked for."""
    house = kit.house(
        groups=[kit.group(), kit.group(window=6)],
        num_blocks=(6, 4),
        max_model_len=16,
        max_num_batched_tokens=2,
        mischief=kit.Mischief(speculate_every=1),
    )
    house.add(kit.spec("a", [0, 0], 13))
    house.run()
    assert house.stories["a"].last.num_preemptions == 0


# ------------------------------------------------------------------------------ several tokens


def test_several_tokens_of_one_step_are_all_taken(kit):
    """What a worker speculated and accepted; the next step closes the gap."""
    house = kit.house(mischief=kit.Mischief(speculate_every=2))
    house.add(kit.spec("a", [1, 2, 3], 8))
    house.run()
    house.check_output(house.stories["a"])
    assert len(house.batches) < 8
    assert 3 in [batch.num_new_tokens[0] for batch in house.batches[1:]]


def test_several_tokens_end_at_the_first_that_ends(kit):
    """What comes after a stop token never was."""
    tokens = kit.run_alone(kit.spec(max_tokens=3), 64).tokens
    assert len(set(tokens)) == 3
    sampling = SamplingSpec(num_logprobs=0)
    house = kit.house(mischief=kit.Mischief(speculate_every=1))
    house.add(kit.spec(max_tokens=9, stop_token_ids=(tokens[1],), sampling=sampling))
    house.run()
    house.check_output(house.stories["a"])
    assert house.stories["a"].tokens == tokens[:2]


def test_several_tokens_with_a_later_step_in_flight_start_the_request_over(kit):
    """The later step counted on one token; its result is thrown away and nothing is lost."""
    house = kit.house(depth=2, mischief=kit.Mischief(speculate_every=3))
    house.add(kit.spec("a", [1, 2, 3], 12))
    house.run()
    assert house.stories["a"].last.num_preemptions > 0
    house.check_output(house.stories["a"])


# ------------------------------------------------------------------------------- failed steps


def test_failed_step_is_tried_again_with_half_the_tokens(kit):
    """What did not fit may fit in two parts; everybody finishes."""
    house = kit.house(mischief=kit.Mischief(oom_steps=frozenset({0})))
    for name in "ab":
        house.add(kit.spec(name, [ord(name)] * 12, 3))
    house.step()
    house.step()
    assert [batch.num_tokens for batch in house.batches] == [24, 12]
    house.run()
    assert house.scheduler.statistics().num_failed_steps == 1
    for story in house.stories.values():
        house.check_output(story)
        assert story.last.num_preemptions == 1


def test_steps_grow_again_after_a_failure(kit):
    """A moment's shortage does not slow the engine for ever."""
    house = kit.house(mischief=kit.Mischief(oom_steps=frozenset({0})), max_model_len=400,
                      num_blocks=(500,))  # fmt: skip
    house.add(kit.spec("a", [1] * 32, 60))
    house.run()
    house.add(kit.spec("b", [2] * 90, 1))
    assert columns(house.submit()) == {"b": 32}


def test_step_that_cannot_be_smaller_is_tried_twice(kit):
    """A moment's shortage ends no request."""
    house = kit.house(mischief=kit.Mischief(oom_steps=frozenset({2, 5})))
    house.add(kit.spec("a", [1, 2, 3], 8))
    house.run()
    house.check_output(house.stories["a"])
    assert house.stories["a"].reason is FinishReason.LENGTH
    assert house.scheduler.statistics().num_failed_steps == 2


def test_device_that_holds_small_steps_only_finishes_everybody(kit):
    """Slower, but done."""
    house = kit.house(mischief=kit.Mischief(oom_above=5), depth=2)
    for name in "abc":
        house.add(kit.spec(name, [ord(name)] * 12, 5))
    house.run(max_steps=400)
    for story in house.stories.values():
        house.check_output(story)
        assert story.reason is FinishReason.LENGTH


@pytest.mark.parametrize("is_late", [False, True])
def test_request_that_fits_no_step_ends_alone_with_the_reason(kit, is_late):
    """One that cannot be computed does not take the others with it."""
    house = kit.house(
        enable_chunked_prefill=False, mischief=kit.Mischief(oom_above=9, oom_is_late=is_late)
    )
    house.add(kit.spec("a", [1] * 8, 3))
    house.add(kit.spec("b", [2] * 12, 3))
    house.add(kit.spec("c", [3] * 8, 3))
    house.run(max_steps=200)
    assert house.stories["b"].reason is FinishReason.ERROR
    assert house.stories["b"].last.error == "no room"
    for name in "ac":
        assert house.stories[name].reason is FinishReason.LENGTH
        house.check_output(house.stories[name])


def test_device_without_any_memory_fails_every_request_and_stops(kit):
    """No endless loop."""
    house = kit.house(mischief=kit.Mischief(oom_above=0))
    for name in "abc":
        house.add(kit.spec(name, [1] * 12, 3))
    house.run(max_steps=60)
    assert {story.reason for story in house.stories.values()} == {FinishReason.ERROR}


def test_failed_step_repeats_what_the_worker_must_forget(kit):
    """Nobody knows how much of the step the worker took in."""
    house = kit.house()
    scheduler = house.scheduler
    scheduler.add(kit.spec("a", [1], 1))
    first = scheduler.schedule()
    scheduler.update(first, StepResult(step_id=0, sampled_token_ids=[[5]]))
    scheduler.add(kit.spec("b", [1, 2, 3], 4))
    second = scheduler.schedule()
    assert second.finished_request_ids == ["a"]
    assert scheduler.fail_step(second, "no room") == []
    third = scheduler.schedule()
    assert sorted(third.finished_request_ids) == ["a", "b"]
    assert [new.request_id for new in third.new_requests] == ["b"]


def test_step_that_fails_at_submission_leaves_the_one_before_it_in_flight(kit):
    """The earlier step is done and its tokens count; the later one is void."""
    house = kit.house()
    scheduler = house.scheduler
    scheduler.add(kit.spec("a", [1, 2, 3], 4))
    first = scheduler.schedule()
    second = scheduler.schedule()
    scheduler.fail_step(second, "no room")
    house.check()
    assert scheduler.schedule() is None
    [update] = scheduler.update(first, StepResult(step_id=0, sampled_token_ids=[[5]]))
    assert update.new_token_ids == [5]
    third = scheduler.schedule()
    assert third.new_requests[0].token_ids == [1, 2, 3, 5]
    assert third.num_new_tokens == [4]
    house.check()


def test_abort_during_a_failed_step_leaves_nothing(kit):
    """Ends and failures may meet."""
    house = kit.house(depth=2)
    scheduler = house.scheduler
    scheduler.add(kit.spec("a", [1] * 4, 9))
    first, _ = scheduler.schedule(), scheduler.schedule()
    scheduler.abort(["a"])
    assert scheduler.fail_step(first, "no room") == []
    assert not scheduler.has_work()
    house.check_empty()
