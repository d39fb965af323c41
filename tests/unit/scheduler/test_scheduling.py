"""Which tokens a step computes: rule by rule."""

from __future__ import annotations

import pytest

from quire.core.interface.worker import SamplingSpec
from quire.core.scheduler.policy import SchedulingPolicy
from quire.core.scheduler.request import FinishReason


def columns(batch):
    """What a batch computes, by request."""
    return dict(zip(batch.request_ids, batch.num_new_tokens, strict=True))


def test_nothing_to_do_gives_no_step(kit):
    """An idle engine burns nothing."""
    house = kit.house()
    assert house.scheduler.schedule() is None
    assert not house.scheduler.has_work()


def test_new_request_joins_those_that_run(kit):
    """Continuous batching: nobody waits for a batch to end."""
    house = kit.house()
    house.add(kit.spec("a", [1, 2, 3], 5))
    house.step()
    house.add(kit.spec("b", [4, 5], 5))
    assert columns(house.submit()) == {"a": 1, "b": 2}


def test_prompt_longer_than_a_step_comes_in_chunks_and_samples_at_its_end(kit):
    """A long prompt takes several steps; a token comes only of the last."""
    house = kit.house(max_num_batched_tokens=4)
    house.add(kit.spec("a", range(10), 2))
    steps = [house.submit() or house.collect() for _ in range(1)]
    house.collect()
    steps += [house.submit()]
    house.collect()
    steps += [house.submit()]
    assert [step.num_new_tokens for step in steps] == [[4], [4], [2]]
    assert [step.samples for step in steps] == [[False], [False], [True]]
    assert [step.num_computed_tokens for step in steps] == [[0], [4], [8]]


def test_chunk_leaves_a_token_to_everyone_who_runs_behind_it(kit):
    """A long prompt of high priority does not stop the output of others."""
    house = kit.house(max_num_batched_tokens=8, policy="priority")
    house.add(kit.spec("b", [1], 9, priority=1))
    house.add(kit.spec("c", [2], 9, priority=1))
    house.step()
    house.add(kit.spec("a", range(20), 2, priority=0))
    assert columns(house.submit()) == {"b": 1, "c": 1, "a": 6}
    house.collect()
    assert columns(house.submit()) == {"a": 6, "b": 1, "c": 1}


def test_chunk_limit_lets_prompts_share_a_step(kit):
    """Short prompts need not wait behind a long one."""
    house = kit.house(max_num_batched_tokens=12, max_chunk_tokens=5)
    house.add(kit.spec("a", range(20), 2))
    house.add(kit.spec("b", [1, 2], 2))
    assert columns(house.submit()) == {"a": 5, "b": 2}
    house.run()


def test_without_chunks_a_prompt_waits_until_it_fits_whole(kit):
    """Some devices compute a prompt in one go or not at all."""
    house = kit.house(max_num_batched_tokens=8, enable_chunked_prefill=False)
    house.add(kit.spec("a", [1] * 5, 2))
    house.add(kit.spec("b", [2] * 8, 2))
    assert columns(house.submit()) == {"a": 5}
    house.collect()
    assert columns(house.submit()) == {"a": 1}
    house.collect()
    assert columns(house.submit()) == {"b": 8}


def test_without_chunks_a_preempted_request_that_outgrew_a_step_resumes_in_chunks(kit):
    """Its prompt fitted a step, its output made it longer; it must not wait for ever."""
    house = kit.house(
        max_num_batched_tokens=6,
        enable_chunked_prefill=False,
        enable_prefix_caching=False,
        num_blocks=(9,),
    )
    house.add(kit.spec("a", [1] * 4, 24))
    house.add(kit.spec("b", [2] * 4, 20))
    house.run()
    assert house.stories["b"].last.num_preemptions > 0
    house.check_output(house.stories["b"])


def test_seats_are_limited(kit):
    """A worker has rows for so many requests."""
    house = kit.house(max_num_seqs=2)
    for name in "abc":
        house.add(kit.spec(name, [1, 2], 2))
    assert columns(house.submit()) == {"a": 2, "b": 2}
    assert (house.scheduler.num_running, house.scheduler.num_waiting) == (2, 1)


def test_tokens_of_a_step_are_limited(kit):
    """The largest step is what the memory was measured for."""
    house = kit.house(max_num_batched_tokens=5)
    for name in "abc":
        house.add(kit.spec(name, [1, 2, 3], 2))
    assert columns(house.submit()) == {"a": 3, "b": 2}


def test_fcfs_keeps_the_order_of_arrival(kit):
    """Priorities mean nothing where nobody asked for them."""
    house = kit.house(max_num_seqs=1)
    house.add(kit.spec("a", [1], 1, priority=5))
    house.add(kit.spec("b", [2], 1, priority=1))
    assert house.submit().request_ids == ["a"]


def test_priority_goes_before_arrival(kit):
    """A lower number first; among equals, who came first."""
    house = kit.house(max_num_seqs=1, policy="priority")
    for name, priority in (("a", 1), ("b", 0), ("c", 0), ("d", -1)):
        house.add(kit.spec(name, [1], 1, priority=priority))
    house.run()
    assert [batch.request_ids for batch in house.batches] == [["d"], ["b"], ["c"], ["a"]]


def test_decode_brings_blocks_only_where_one_begins(kit):
    """The manager is not asked, and nothing crosses the boundary, for tokens within a block."""
    house = kit.house()
    house.add(kit.spec("a", [1, 2, 3], 8))
    house.run()
    grown = [batch.new_block_ids[0] is not None for batch in house.batches]
    assert grown == [False, False, True, False, False, False, True, False]


def test_new_request_carries_all_blocks_of_its_prompt(kit):
    """A prompt that was begun never waits for blocks half-way."""
    house = kit.house(max_num_batched_tokens=4)
    house.add(kit.spec("a", range(10), 2))
    [new] = house.submit().new_requests
    assert [len(block_ids) for block_ids in new.block_ids] == [3]


def test_admission_leaves_a_block_to_everyone_who_runs(kit):
    """A newcomer that would be preempted at once only wastes work."""
    house = kit.house(num_blocks=(7,))
    house.add(kit.spec("a", [1] * 12, 8))
    house.step()
    house.add(kit.spec("b", [2] * 12, 4))
    assert columns(house.submit()) == {"a": 1}
    house.collect()
    house.abort("a")
    assert columns(house.submit()) == {"b": 12}


def test_last_to_come_gives_way_and_comes_back_first(kit):
    """The oldest always finishes, and who was preempted does not queue again."""
    house = kit.house(num_blocks=(7,), enable_prefix_caching=False)
    house.add(kit.spec("a", [1] * 8, 16))
    house.add(kit.spec("b", [2] * 8, 12))
    house.step()
    house.add(kit.spec("c", [3] * 4, 4))
    order = []
    while house.scheduler.has_work():
        house.step()
        order += [new.request_id for new in house.batches[-1].new_requests]
    assert order[0] == "b"
    assert house.stories["a"].last.num_preemptions == 0
    assert house.stories["b"].last.num_preemptions == 1
    assert house.scheduler.statistics().num_preemptions == 1
    house.check_empty()


def test_preempted_request_resumes_as_new_with_all_its_tokens(kit):
    """The worker has forgotten it, and what was sampled is not sampled again."""
    house = kit.house(num_blocks=(6,), enable_prefix_caching=False)
    house.add(kit.spec("a", [1] * 8, 12))
    house.add(kit.spec("b", [2] * 7, 8))
    house.run()
    news = [new for batch in house.batches for new in batch.new_requests]
    [first, second] = [new for new in news if new.request_id == "b"]
    story = house.stories["b"]
    assert len(second.token_ids) > len(first.token_ids) == 7
    assert second.token_ids == [2] * 7 + story.tokens[: len(second.token_ids) - 7]
    assert second.num_prompt_tokens == 7
    forgotten = [name for batch in house.batches for name in batch.finished_request_ids]
    assert forgotten.count("b") == 1
    house.check_output(story)


def test_preempted_request_gets_its_blocks_back_from_the_prefix_cache(kit):
    """Recomputing costs little where its blocks were not given away meanwhile."""
    house = kit.house(num_blocks=(12,))
    house.add(kit.spec("a", [1] * 8, 30))
    house.add(kit.spec("b", [2] * 8, 20))
    house.run()
    news = [new for batch in house.batches for new in batch.new_requests]
    resumed = [new for new in news if new.request_id == "b"][1:]
    assert resumed
    assert all(new.num_computed_tokens > 0 for new in resumed)


def test_low_priority_is_preempted_for_high(kit):
    """Whoever matters least gives way, even if it came first."""
    house = kit.house(num_blocks=(7,), policy="priority", enable_prefix_caching=False)
    house.add(kit.spec("low", [1] * 8, 12, priority=9))
    house.step()
    house.add(kit.spec("high", [2] * 8, 12, priority=0))
    house.run()
    assert house.stories["low"].last.num_preemptions == 1
    assert house.stories["high"].last.num_preemptions == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_any_choice_of_victim_keeps_the_books(kit, depth):
    """A policy decides who suffers, never what comes out; who had its turn in a step is not asked."""

    class First(SchedulingPolicy):
        def choose_victim(self, candidates):
            return candidates[0]

        def num_spare_blocks(self, num_running):
            return 0

    house = kit.house(num_blocks=(7,), policy_object=First(), depth=depth)
    for number, name in enumerate("abcd"):
        house.add(kit.spec(name, [number] * (4 + number), 8))
    house.run()
    assert house.scheduler.statistics().num_preemptions > 0
    for story in house.stories.values():
        house.check_output(story)


def test_shared_prefix_is_computed_once(kit):
    """Sixteen tokens of system prompt, for the second request for nothing."""
    house = kit.house()
    system = list(range(1, 17))
    house.add(kit.spec("a", [*system, 3, 3], 2))
    house.run()
    house.add(kit.spec("b", [*system, 4, 4], 2))
    assert columns(house.submit()) == {"b": 2}
    house.collect()
    house.run()
    assert house.stories["b"].last.num_cached_tokens == 16
    assert house.stories["a"].last.num_cached_tokens == 0
    assert house.scheduler.statistics().num_prefix_hit_tokens == 16


def test_salt_keeps_prefixes_apart(kit):
    """What one tenant computed another one does not find."""
    house = kit.house()
    for name, salt in (("a", "x"), ("b", "y"), ("c", None), ("d", "x")):
        house.add(kit.spec(name, range(1, 18), 1, cache_salt=salt))
        house.run()
    cached = {name: story.last.num_cached_tokens for name, story in house.stories.items()}
    assert cached == {"a": 0, "b": 0, "c": 0, "d": 16}


def test_same_prompts_at_once_wait_for_the_first(kit):
    """n outputs of one prompt cost one prompt."""
    prompt = [(i * i) % 250 for i in range(130)]
    house = kit.house(num_blocks=(300,), max_num_batched_tokens=600, max_model_len=200)
    for name in "abcd":
        house.add(kit.spec(name, prompt, 3))
    house.add(kit.spec("other", [7] * 50, 3))
    assert columns(house.submit()) == {"a": 130, "other": 50}
    house.collect()
    assert columns(house.submit()) == {"a": 1, "b": 2, "c": 2, "d": 2, "other": 1}
    house.collect()
    house.run()


def test_request_that_waits_for_a_prefix_keeps_its_seat(kit):
    """Who comes later does not overtake it by that."""
    house = kit.house(
        num_blocks=(300,), max_num_batched_tokens=600, max_model_len=200, max_num_seqs=2
    )
    for name in "ab":
        house.add(kit.spec(name, [1] * 130, 3))
    house.add(kit.spec("c", [7] * 5, 3))
    assert columns(house.submit()) == {"a": 130}
    house.collect()
    assert columns(house.submit()) == {"a": 1, "b": 2}
    house.run()


def test_short_common_prefix_is_computed_twice_rather_than_waited_for(kit):
    """A step that runs half empty costs more than a few tokens."""
    house = kit.house()
    for name in "ab":
        house.add(kit.spec(name, [*range(1, 9), ord(name)], 2))
    assert columns(house.submit()) == {"a": 9, "b": 9}


def test_request_that_waits_for_a_prefix_goes_on_when_its_owner_is_gone(kit):
    """Whoever was to compute it may be aborted."""
    prompt = [1] * 130
    house = kit.house(num_blocks=(300,), max_num_batched_tokens=64, max_model_len=200)
    house.add(kit.spec("a", prompt, 3))
    house.add(kit.spec("b", prompt, 3))
    house.step()
    house.abort("a")
    assert columns(house.submit()) == {"b": 64}
    house.collect()
    house.run()


def test_ids_to_forget_go_with_the_next_step(kit):
    """A step is not made for them alone."""
    house = kit.house()
    house.add(kit.spec("a", [1], 1))
    house.step()
    assert house.scheduler.schedule() is None
    house.add(kit.spec("b", [1], 1))
    assert house.submit().finished_request_ids == ["a"]
    house.collect()
    house.add(kit.spec("c", [1], 1))
    assert house.submit().finished_request_ids == ["b"]


def test_request_that_never_ran_is_not_forgotten(kit):
    """The worker does not know its name."""
    house = kit.house(max_num_seqs=1)
    house.add(kit.spec("a", [1], 3))
    house.add(kit.spec("b", [1], 3))
    house.step()
    [update] = house.abort("b")
    assert update.finish_reason is FinishReason.ABORT
    house.run()
    assert all("b" not in batch.finished_request_ids for batch in house.batches)


def test_abort_of_a_running_request_frees_its_blocks(kit):
    """A client that went away costs nothing more."""
    house = kit.house()
    house.add(kit.spec("a", [1] * 9, 30))
    house.step()
    [update] = house.abort("a", "nobody")
    assert (update.request_id, update.finish_reason) == ("a", FinishReason.ABORT)
    assert house.abort("a") == []
    house.check_empty()


def test_statistics_tell_the_state_of_the_moment(kit):
    """What metrics show."""
    house = kit.house(max_num_seqs=1)
    house.add(kit.spec("a", [1] * 8, 4))
    house.add(kit.spec("b", [2] * 8, 4))
    house.submit()
    statistics = house.scheduler.statistics()
    assert (statistics.num_running, statistics.num_waiting) == (1, 1)
    assert (statistics.num_steps_in_flight, statistics.num_steps) == (1, 1)
    assert statistics.num_scheduled_tokens == 8
    assert statistics.cache_usage == pytest.approx(2 / 64)
    house.collect()
    assert house.scheduler.statistics().num_sampled_tokens == 1


def test_first_scheduled_time_is_that_of_the_first_step(kit):
    """Time in the queue is measured, once."""
    house = kit.house()
    house.add(kit.spec("a", [1], 3))
    house.scheduler._clock = lambda: 5.0
    house.submit()
    house.scheduler._clock = lambda: 9.0
    house.collect()
    house.run()
    assert house.stories["a"].last.first_scheduled_time_s == 5.0


def test_integrity_check_finds_books_that_disagree(kit):
    """A check that cannot fail protects nothing."""
    house = kit.house()
    house.add(kit.spec("a", [1] * 5, 5))
    house.step()
    [request] = house.scheduler._book.running
    request.num_tokens += 1
    with pytest.raises(AssertionError):
        house.check()
    request.num_tokens -= 1
    house.scheduler._book.running.clear()
    with pytest.raises(AssertionError, match="placed"):
        house.check()


def test_right_guesses_save_steps_and_wrong_ones_change_nothing(kit):
    """A request that is guessed for says what it says alone, in fewer steps."""
    spec = kit.spec("a", prompt=range(1, 9), max_tokens=20)
    steps = []
    for num_guessed in (0, 3):
        house = kit.house(num_guessed_tokens=num_guessed)
        house.add(spec)
        house.run()
        house.check_output(house.stories["a"])
        house.check_empty()
        steps.append(house.scheduler.statistics())
    assert steps[1].num_steps < steps[0].num_steps * 0.6
    assert 0 < steps[1].num_right_guesses < steps[1].num_guesses


def test_guesses_are_for_those_whose_sampling_allows_them(kit):
    """Log-probabilities and penalties depend on what a guess does not bring."""
    for sampling in (SamplingSpec(num_logprobs=1), SamplingSpec(frequency_penalty=0.1)):
        house = kit.house(num_guessed_tokens=3)
        house.add(kit.spec("a", max_tokens=8, sampling=sampling))
        house.run()
        assert house.scheduler.statistics().num_guesses == 0


def test_nothing_is_guessed_behind_a_chunk_of_one_token(kit):
    """What follows the middle of a prompt stands in the prompt; a guess is of what comes after."""
    house = kit.house(num_guessed_tokens=3, max_chunk_tokens=1)
    house.add(kit.spec("a", prompt=range(1, 9), max_tokens=6))
    house.run()
    house.check_output(house.stories["a"])
    assert house.scheduler.statistics().num_right_guesses > 0
