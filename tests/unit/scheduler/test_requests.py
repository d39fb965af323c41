"""How requests come in, and how they end."""

from __future__ import annotations

import pytest

from quire.core.errors import ConfigError, RequestError
from quire.core.interface.worker import SamplingSpec, StepResult
from quire.core.scheduler.policy import PriorityPolicy, SchedulingPolicy, make_policy
from quire.core.scheduler.request import FinishReason


def outputs(kit, prompt, count, seed=0):
    """The tokens that the device samples after a prompt."""
    history = list(prompt)
    for _ in range(count):
        history.append(kit.sample(history, seed))
    return history[len(prompt) :]


def finish(kit, spec, **options):
    """Runs one request to its end."""
    house = kit.house(**options)
    house.add(spec)
    house.run()
    return house.stories[spec.request_id]


# ------------------------------------------------------------------------------------ coming in


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"prompt": []}, "no tokens", "prompt"),
        ({"max_tokens": 0}, "max_tokens is 0", "max_tokens"),
        ({"prompt": [1] * 64}, "64 tokens.*context of 64", "prompt"),
    ],
)
def test_request_that_can_never_run_is_refused(kit, changes, message, param):
    """It would wait for ever."""
    house = kit.house()
    with pytest.raises(RequestError, match=message) as caught:
        house.add(kit.spec(**changes))
    assert caught.value.param == param
    assert not house.scheduler.has_work()


def test_request_larger_than_the_whole_cache_is_refused(kit):
    """Preempting everybody would not help it; the largest that fits is taken."""
    house = kit.house(num_blocks=(5,))
    with pytest.raises(RequestError, match="18 tokens need more blocks than the whole KV cache"):
        house.add(kit.spec("a", [1] * 10, 8))
    house.add(kit.spec("a", [1] * 10, 7))
    house.run()
    assert len(house.stories["a"].tokens) == 7


def test_prompt_longer_than_a_step_is_refused_where_there_are_no_chunks(kit):
    """It could never be computed whole."""
    house = kit.house(max_num_batched_tokens=8, enable_chunked_prefill=False)
    with pytest.raises(RequestError, match="at most 8 and chunked prefill is off"):
        house.add(kit.spec("a", [1] * 9, 2))


def test_id_in_use_is_refused_and_free_again_after_the_end(kit):
    """Results are told apart by it."""
    house = kit.house()
    house.add(kit.spec("a", [1], 2))
    with pytest.raises(RequestError, match="'a' is in use"):
        house.add(kit.spec("a", [2], 2))
    house.run()
    house.add(kit.spec("a", [2], 2))
    house.run()
    house.check_output(house.stories["a"])


def test_full_queue_refuses_one_more(kit):
    """Better told at once than kept waiting for minutes; seats that are free do not count as queue."""
    house = kit.house(max_num_seqs=2, max_num_queued=1)
    for name in "abc":
        house.add(kit.spec(name, [1], 3))
    with pytest.raises(RequestError, match="0 requests run and 3 wait; max_num_queued is 1"):
        house.add(kit.spec("d", [1], 3))
    house.step()
    with pytest.raises(RequestError, match="2 requests run and 1 wait"):
        house.add(kit.spec("d", [1], 3))
    house.abort("c")
    house.add(kit.spec("d", [1], 3))
    house.run()


def test_many_aborts_in_the_queue_leave_no_trace(kit):
    """The queue forgets those that left while they waited."""
    house = kit.house(max_num_seqs=1)
    for number in range(300):
        house.add(kit.spec(f"r{number}", [1], 2))
    house.step()
    house.abort(*(f"r{number}" for number in range(5, 300)))
    assert house.scheduler.num_waiting == 4
    assert len(house.scheduler._book.waiting._heap) < 100
    house.run()


# ------------------------------------------------------------------------------------------ ends


def test_eos_token_ends_the_output_and_belongs_to_it(kit):
    """The front needs the token to know that it came."""
    tokens = outputs(kit, [1, 2, 3], 3)
    story = finish(kit, kit.spec(max_tokens=9, eos_token_ids=(tokens[2],)))
    assert story.tokens == tokens[: tokens.index(tokens[2]) + 1]
    assert (story.reason, story.last.stop_reason) == (FinishReason.STOP, None)


def test_stop_token_of_the_user_is_named(kit):
    """Users tell their stops apart."""
    tokens = outputs(kit, [1, 2, 3], 3)
    story = finish(kit, kit.spec(max_tokens=9, stop_token_ids=(tokens[0], 99)))
    assert story.tokens == tokens[:1]
    assert (story.reason, story.last.stop_reason) == (FinishReason.STOP, tokens[0])


def test_eos_goes_before_the_same_token_as_stop(kit):
    """The end of the sequence is no stop string."""
    [token] = outputs(kit, [1, 2, 3], 1)
    story = finish(kit, kit.spec(eos_token_ids=(token,), stop_token_ids=(token,)))
    assert story.last.stop_reason is None


def test_no_stop_before_min_tokens(kit):
    """A token that ends the output later does not end it now."""
    prompt = [1, 2, 3]
    tokens = outputs(kit, prompt, 40)
    early = tokens[0]
    again = tokens.index(early, 1)
    sampling = SamplingSpec(min_tokens=2)
    story = finish(kit, kit.spec(max_tokens=40, eos_token_ids=(early,), sampling=sampling))
    assert story.tokens == tokens[: again + 1]


def test_max_tokens_ends_with_length(kit):
    """As asked."""
    story = finish(kit, kit.spec(max_tokens=3))
    assert (len(story.tokens), story.reason) == (3, FinishReason.LENGTH)


def test_context_ends_with_length(kit):
    """Prompt and output fit the model, whatever was asked."""
    story = finish(kit, kit.spec("a", [1] * 60, 100))
    assert (len(story.tokens), story.reason) == (4, FinishReason.LENGTH)


def test_stop_token_at_the_last_place_is_a_stop(kit):
    """The more telling reason is given."""
    tokens = outputs(kit, [1, 2, 3], 2)
    if tokens[0] == tokens[1]:
        pytest.fail("the prompt does not show what it should; choose another")
    story = finish(kit, kit.spec(max_tokens=2, eos_token_ids=(tokens[1],)))
    assert story.reason is FinishReason.STOP


def test_failed_request_ends_alone(kit):
    """NaN in one row harms no other."""
    house = kit.house(mischief=kit.Mischief(error_every=2))
    house.add(kit.spec("a", [1, 2], 1))
    house.add(kit.spec("b", [3, 4], 1))
    house.run()
    assert house.stories["a"].reason is FinishReason.LENGTH
    last = house.stories["b"].last
    assert (last.finish_reason, last.error, last.new_token_ids) == (FinishReason.ERROR, "nan", [])


def test_failed_request_leaves_nothing_in_the_prefix_cache_of_its_step(kit):
    """What a step that failed wrote may be rubbish."""
    house = kit.house(mischief=kit.Mischief(error_every=1))
    house.add(kit.spec("a", range(1, 18), 1))
    house.run()
    house.device.mischief.error_every = 0
    house.add(kit.spec("b", range(1, 18), 1))
    house.run()
    assert house.stories["b"].last.num_cached_tokens == 0
    house.check_output(house.stories["b"])


@pytest.mark.parametrize(
    ("budget", "tokens", "message"),
    [(32, [], "returned 0 tokens where 1"), (2, [5], "returned 1 tokens where 0")],
)
def test_worker_that_breaks_its_word_fails_the_request(kit, budget, tokens, message):
    """A request that would hang, or go on from a token that nobody counts, ends with a reason."""
    house = kit.house(max_num_batched_tokens=budget)
    house.add(kit.spec("a", [1, 2, 3], 5))
    batch = house.scheduler.schedule()
    result = StepResult(step_id=batch.step_id, sampled_token_ids=[tokens])
    [update] = house.scheduler.update(batch, result)
    assert update.finish_reason is FinishReason.ERROR
    assert message in update.error
    assert house.cache.usage == 0.0


def test_results_out_of_order_are_a_fault_of_ours(kit):
    """Steps come back in the order in which they went."""
    house = kit.house()
    house.add(kit.spec("a", [1, 2, 3], 5))
    first = house.scheduler.schedule()
    second = house.scheduler.schedule()
    with pytest.raises(AssertionError, match="step 0 is next"):
        house.scheduler.update(second, StepResult(step_id=1, sampled_token_ids=[[1]]))
    assert first.step_id == 0


# --------------------------------------------------------------------------------- logprobs


def test_logprobs_come_with_their_tokens(kit):
    """One entry for each token, to those who asked."""
    sampling = SamplingSpec(num_logprobs=0)
    house = kit.house()
    house.add(kit.spec("a", [1, 2], 3, sampling=sampling))
    house.add(kit.spec("b", [1, 2], 3))
    house.run()
    assert [entry.token_id for entry in house.stories["a"].logprobs] == house.stories["a"].tokens
    assert house.stories["b"].logprobs == []


def test_prompt_logprobs_take_no_prefix_and_come_once(kit):
    """They need every position computed; those of a preempted request do not come twice."""
    sampling = SamplingSpec(num_prompt_logprobs=0)
    house = kit.house(num_blocks=(7,), max_num_batched_tokens=5)
    house.add(kit.spec("a", [1] * 8, 12))
    house.step()
    house.add(kit.spec("b", [1] * 8, 12, sampling=sampling))
    house.run()
    story = house.stories["b"]
    assert (story.last.num_cached_tokens, story.last.num_preemptions > 0) == (0, True)
    house.check_output(story)
    assert len(story.prompt_logprobs) == 7


def test_request_whose_prompt_logprobs_went_out_resumes_from_the_prefix(kit):
    """It owes nothing any more."""
    sampling = SamplingSpec(num_prompt_logprobs=0)
    house = kit.house(num_blocks=(12,))
    house.add(kit.spec("a", [1] * 8, 30))
    house.add(kit.spec("b", [2] * 8, 20, sampling=sampling))
    house.run()
    news = [new for batch in house.batches for new in batch.new_requests]
    first, *resumed = [new for new in news if new.request_id == "b"]
    assert first.num_computed_tokens == 0
    assert resumed
    assert all(new.num_computed_tokens > 0 for new in resumed)


# ------------------------------------------------------------------------------------ policies


def test_policies_have_names(kit):
    """What the configuration can say."""
    assert type(make_policy("fcfs")) is SchedulingPolicy
    assert type(make_policy("priority")) is PriorityPolicy
    with pytest.raises(ConfigError, match="'random'; choose fcfs or priority"):
        make_policy("random")


@pytest.mark.parametrize(
    ("missing", "budget", "others", "size"),
    [(10, 20, 0, 10), (10, 4, 0, 4), (10, 8, 3, 5), (10, 8, 30, 1), (2, 8, 3, 2)],
)
def test_chunk_size_leaves_others_their_token_and_is_never_nothing(missing, budget, others, size):
    """Both sides of the compromise."""
    assert SchedulingPolicy().chunk_size(missing, budget, others) == size


@pytest.mark.parametrize(
    ("pending", "missing", "waits"),
    [(64, 100, True), (63, 63, False), (64, 129, False), (1000, 1001, True)],
)
def test_waiting_for_a_prefix_must_be_worth_a_step(pending, missing, waits):
    """Little work, or a small part of it, is done at once."""
    assert SchedulingPolicy().waits_for_prefix(pending, missing) is waits
