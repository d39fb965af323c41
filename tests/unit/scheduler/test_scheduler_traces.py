"""Random lives of the scheduler, on a device that checks every slot that it reads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire.core.interface.worker import SamplingSpec
from quire.core.scheduler.policy import SchedulingPolicy, make_policy
from quire.core.scheduler.request import FinishReason

EXAMPLES = 250
DEEP_EXAMPLES = 5_000
FAMILIES = [[(7 * k + 3 * i + i * i) % 17 for i in range(64)] for k in range(3)]


@dataclass(frozen=True)
class Plot:
    """One request of a scenario, in numbers that shrink."""

    arrives_at: int
    family: int
    num_shared: int
    tail: tuple[int, ...]
    continues: bool
    """The prompt is the last request's prompt with its whole output, and the tail."""
    max_tokens: int
    priority: int
    salt: str | None
    seed: int
    stops: tuple[int, ...]
    min_tokens: int
    wants_logprobs: bool
    wants_prompt_logprobs: bool
    aborts_after: int | None


@dataclass(frozen=True)
class Scenario:
    """A house and what happens in it."""

    plots: list[Plot]
    windows: tuple[int | str | None, ...]
    """Of each group; `recurrent` for one that keeps states."""
    block_sizes: tuple[int, ...]
    spare_blocks: int
    """Blocks beyond what one request of the full length needs."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int | None
    enable_chunked_prefill: bool
    enable_prefix_caching: bool
    policy: str
    depth: int
    is_lazy: bool
    error_every: int
    oom_steps: frozenset[int]
    oom_is_late: bool
    speculate_every: int
    resets_at: int | None
    is_patient: bool
    """Requests wait for any prefix that another one computes, however short."""
    num_guessed_tokens: int
    victim: int
    """Which of the candidates is preempted."""


plots = st.builds(
    Plot,
    arrives_at=st.integers(0, 12),
    family=st.integers(0, 2),
    num_shared=st.integers(0, 20),
    tail=st.lists(st.integers(0, 16), min_size=1, max_size=5).map(tuple),
    continues=st.booleans(),
    max_tokens=st.integers(1, 14),
    priority=st.integers(0, 2),
    salt=st.sampled_from([None, None, "x", ""]),
    seed=st.integers(0, 3),
    stops=st.lists(st.integers(0, 16), max_size=2).map(tuple),
    min_tokens=st.integers(0, 4),
    wants_logprobs=st.booleans(),
    wants_prompt_logprobs=st.sampled_from([False, False, True]),
    aborts_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)

shapes = st.sampled_from(
    [
        ((None,), (4,)),
        ((None,), (1,)),
        ((5,), (4,)),
        ((None, 6), (4, 4)),
        ((None, 1), (2, 2)),
        ((None, 5, 9), (4, 4, 4)),
        ((None, 6), (4, 2)),
        ((None, 7), (2, 3)),
        (("recurrent",), (4,)),
        ((None, "recurrent"), (4, 8)),
        ((None, "recurrent", 6), (2, 3, 4)),
    ]
)


@st.composite
def scenarios(draw, *, with_mischief: bool):
    windows, block_sizes = draw(shapes)
    none_or = lambda strategy: st.one_of(st.none(), strategy)  # noqa: E731 - a name for a shape
    mischief = with_mischief
    return Scenario(
        plots=draw(st.lists(plots, min_size=1, max_size=8)),
        windows=windows,
        block_sizes=block_sizes,
        spare_blocks=draw(st.one_of(st.integers(0, 3), st.integers(0, 30))),
        max_model_len=draw(st.integers(16, 48)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.one_of(st.integers(1, 8), st.integers(8, 40))),
        max_chunk_tokens=draw(none_or(st.integers(1, 8))),
        enable_chunked_prefill=draw(st.booleans()),
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        depth=draw(st.integers(1, 3)),
        is_lazy=draw(st.booleans()),
        error_every=draw(st.integers(0, 9)) if mischief else 0,
        oom_steps=draw(st.frozensets(st.integers(0, 20), max_size=4)) if mischief else frozenset(),
        oom_is_late=draw(st.booleans()) if mischief else False,
        speculate_every=draw(st.integers(0, 4)) if mischief else 0,
        resets_at=draw(none_or(st.integers(0, 12))) if mischief else None,
        is_patient=draw(st.booleans()),
        num_guessed_tokens=draw(st.sampled_from([0, 0, 1, 3])),
        victim=draw(st.sampled_from([-1, -1, 0, 1])),
    )


class OddPolicy(SchedulingPolicy):
    """A policy that decides as the scenario says: what comes out must not depend on it."""

    def __init__(self, scenario):
        self.scenario = scenario
        self.base = make_policy(scenario.policy)

    def order_key(self, request):
        return self.base.order_key(request)

    def choose_victim(self, candidates):
        return candidates[max(-1, min(self.scenario.victim, len(candidates) - 1))]

    def waits_for_prefix(self, num_pending, num_missing):
        """Tiny prompts, too, wait for each other, so that tiny scenarios show what that does."""
        return self.scenario.is_patient


def build(kit, scenario: Scenario):
    """The house of a scenario: pools that hold one request of the full length, and a few blocks more."""
    groups = [
        kit.group(window, size)
        for window, size in zip(scenario.windows, scenario.block_sizes, strict=True)
    ]
    span = [
        scenario.max_model_len
        if window is None
        else min(
            scenario.max_model_len,
            (2 if window == "recurrent" else window) + scenario.max_num_batched_tokens,
        )
        for window in scenario.windows
    ]
    num_blocks = [
        1 + -(-tokens // group.block_size) + 1 + scenario.spare_blocks
        for tokens, group in zip(span, groups, strict=True)
    ]
    return kit.house(
        groups=groups,
        num_blocks=num_blocks,
        depth=scenario.depth,
        is_lazy=scenario.is_lazy,
        enable_prefix_caching=scenario.enable_prefix_caching,
        mischief=kit.Mischief(
            error_every=scenario.error_every,
            oom_steps=scenario.oom_steps,
            oom_is_late=scenario.oom_is_late,
            speculate_every=scenario.speculate_every,
        ),
        max_model_len=scenario.max_model_len,
        max_num_seqs=scenario.max_num_seqs,
        max_num_batched_tokens=scenario.max_num_batched_tokens,
        max_chunk_tokens=scenario.max_chunk_tokens,
        enable_chunked_prefill=scenario.enable_chunked_prefill,
        num_guessed_tokens=0 if "recurrent" in scenario.windows else scenario.num_guessed_tokens,
        policy=scenario.policy,
        policy_object=OddPolicy(scenario),
    )


def specs_of(kit, scenario: Scenario):
    """The requests of a scenario; some go on where the one before ended, as conversations do."""
    specs = []
    for index, plot in enumerate(scenario.plots):
        prompt = FAMILIES[plot.family][: plot.num_shared] + list(plot.tail)
        if plot.continues and specs:
            last = specs[-1]
            said = kit.run_alone(last, scenario.max_model_len).tokens
            prompt = last.prompt_token_ids + said + list(plot.tail)
        limit = scenario.max_model_len - 1
        if not scenario.enable_chunked_prefill:
            limit = min(limit, scenario.max_num_batched_tokens)
        specs.append(
            kit.spec(
                f"r{index}",
                prompt[:limit],
                plot.max_tokens,
                sampling=SamplingSpec(
                    seed=plot.seed,
                    min_tokens=plot.min_tokens,
                    num_logprobs=0 if plot.wants_logprobs else None,
                    num_prompt_logprobs=0 if plot.wants_prompt_logprobs else None,
                ),
                eos_token_ids=plot.stops[:1],
                stop_token_ids=plot.stops[1:],
                priority=plot.priority,
                cache_salt=plot.salt,
            )
        )
    return specs


def play(kit, scenario: Scenario):
    """Lives through the scenario to its end."""
    house = build(kit, scenario)
    specs = specs_of(kit, scenario)
    for now in range(30):
        for plot, spec in zip(scenario.plots, specs, strict=True):
            if plot.arrives_at == now:
                house.add(spec)
            if plot.aborts_after is not None and plot.arrives_at + plot.aborts_after == now:
                house.abort(spec.request_id)
        if scenario.resets_at == now:
            house.cache.reset_prefix_cache()
        house.step()
    total = sum(len(spec.prompt_token_ids) + spec.max_tokens for spec in specs)
    house.run(max_steps=100 + 10 * total)
    return house


def settings_for(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def check_tame(kit, scenario):
    house = play(kit, scenario)
    for plot, name in zip(scenario.plots, sorted(house.stories), strict=True):
        story = house.stories[name]
        house.check_output(story)
        assert story.reason is not FinishReason.ERROR
        if plot.aborts_after is None:
            assert story.reason is not FinishReason.ABORT


def check_wild(kit, scenario):
    house = play(kit, scenario)
    for story in house.stories.values():
        house.check_output(story)


@settings_for(EXAMPLES)
@given(scenario=scenarios(with_mischief=False))
def test_output_in_any_company_is_that_of_the_request_alone(kit, scenario):
    """Batching, chunks, preemption, prefixes and overlap change no token, leak no block and starve nobody."""
    check_tame(kit, scenario)


@settings_for(EXAMPLES)
@given(scenario=scenarios(with_mischief=True))
def test_output_under_failures_is_a_part_of_that_of_the_request_alone(kit, scenario):
    """Errors, failed steps, speculation and resets harm nobody else, leak no block and starve nobody."""
    check_wild(kit, scenario)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings_for(DEEP_EXAMPLES)
@given(scenario=scenarios(with_mischief=False))
def test_output_in_any_company_holds_over_many_lives(kit, scenario):
    """As above, deeper."""
    check_tame(kit, scenario)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings_for(DEEP_EXAMPLES)
@given(scenario=scenarios(with_mischief=True))
def test_output_under_failures_holds_over_many_lives(kit, scenario):
    """As above, deeper."""
    check_wild(kit, scenario)
