"""A step that is moved on from the one before against the same step made anew."""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from random import Random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.interface import NewRequest, SamplingSpec, StepBatch
from quire.core.worker.buckets import Buckets
from quire.core.worker.input_batch import InputBatch
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.prepared_step import PreparedStep, continued_step, prepare_step

BLOCK_SIZES = (4, 8)
MAX_LEN = 48
SAMPLINGS = (
    SamplingSpec(temperature=0.0),
    SamplingSpec(temperature=0.8, seed=3, top_k=5),
    SamplingSpec(temperature=0.0, min_tokens=4, min_tokens_forbids=(7,)),
    SamplingSpec(temperature=0.0, num_logprobs=2),
)


class Traffic:
    """Random steps of a worker's batch: most of them only go on."""

    def __init__(self, random: Random, samplings: tuple[SamplingSpec, ...]) -> None:
        self.random = random
        self.samplings = samplings
        self.requests = InputBatch(
            capacity=16,
            max_model_len=MAX_LEN,
            block_sizes=BLOCK_SIZES,
            vocab_size=100,
            processors=LogitsProcessors(),
        )
        self.lengths: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.names: list[str] = []
        self.num_made = 0
        self.num_blocks = 1
        self.step_id = 0

    def goes_on(self) -> StepBatch | None:
        """The step that computes what the last one sampled, if all of it is to be computed."""
        names = self.names
        if not names or any(self.lengths[n] != self.computed[n] + 1 for n in names):
            return None
        return self._batch([], names, []) if self._fit(names) else None

    def changes(self) -> StepBatch:
        """A step with others, in another order, or of several tokens each."""
        finished = [n for n in self.lengths if self.random.random() < 0.3 or not self._fit([n])]
        for name in finished:
            del self.lengths[name], self.computed[name]
        new = []
        while not self.lengths or (len(self.lengths) < 5 and self.random.random() < 0.5):
            new.append(self._new_request())
        names = list(self.lengths)
        self.random.shuffle(names)
        return self._batch(new, names, finished)

    def _fit(self, names: list[str]) -> bool:
        return all(self.lengths[name] < MAX_LEN for name in names)

    def _new_request(self) -> NewRequest:
        name = f"request-{self.num_made}"
        self.num_made += 1
        self.lengths[name] = length = self.random.randint(1, 12)
        self.computed[name] = 0
        return NewRequest(
            request_id=name,
            token_ids=[self.random.randrange(100) for _ in range(length)],
            num_prompt_tokens=length,
            num_computed_tokens=0,
            block_ids=[self._blocks(-(-length // size)) for size in BLOCK_SIZES],
            sampling=self.random.choice(self.samplings),
        )

    def _batch(self, new: list[NewRequest], names: list[str], finished: list[str]) -> StepBatch:
        fresh = {one.request_id for one in new}
        counts = [self._count(self.lengths[n] - self.computed[n]) for n in names]
        batch = StepBatch(
            step_id=self.step_id,
            finished_request_ids=finished,
            new_requests=new,
            request_ids=list(names),
            num_new_tokens=counts,
            num_computed_tokens=[self.computed[name] for name in names],
            new_block_ids=[None if name in fresh else self._grown(name) for name in names],
            samples=[
                self.computed[name] + count == self.lengths[name]
                for name, count in zip(names, counts, strict=True)
            ],
        )
        self.step_id += 1
        self.names = list(names)
        for name, count, samples in zip(names, counts, batch.samples, strict=True):
            self.computed[name] += count
            self.lengths[name] += samples
        return batch

    def _count(self, missing: int) -> int:
        return missing if self.random.random() < 0.8 else self.random.randint(1, missing)

    def _grown(self, name: str) -> list[list[int]] | None:
        """A block for the token that begins one."""
        last = self.lengths[name] - 1
        is_new = self.computed[name] + 1 == self.lengths[name] and last > 0
        blocks = [self._blocks(int(is_new and last % size == 0)) for size in BLOCK_SIZES]
        return blocks if any(blocks) else None

    def _blocks(self, count: int) -> list[int]:
        self.num_blocks += count
        return list(range(self.num_blocks - count, self.num_blocks))


def compare(found: object, wanted: object, where: str = "step") -> None:
    """Every field, arrays by value and dtype."""
    if dataclasses.is_dataclass(wanted):
        for one in dataclasses.fields(wanted):
            compare(getattr(found, one.name), getattr(wanted, one.name), f"{where}.{one.name}")
    elif isinstance(wanted, np.ndarray):
        assert isinstance(found, np.ndarray), where
        assert found.dtype == wanted.dtype, where
        np.testing.assert_array_equal(found, wanted, err_msg=where)
    elif isinstance(wanted, dict):
        assert isinstance(found, dict), where
        assert found.keys() == wanted.keys(), where
        for name in wanted:
            compare(found[name], wanted[name], f"{where}.{name}")
    elif where.endswith((".block_tables", ".slot_mappings")):
        for group, (one, other) in enumerate(zip(found, wanted, strict=True)):
            compare(one, other, f"{where}.{group}")
    else:
        assert found == wanted, where


def run_step(
    traffic: Traffic, buckets: Buckets, last: PreparedStep | None, *, goes_on: bool
) -> PreparedStep:
    """One step, made in both ways where there are two."""
    batch = (traffic.goes_on() if goes_on else None) or traffic.changes()
    requests = traffic.requests
    change = requests.apply(batch)
    step = requests.scheduled(batch)
    made = prepare_step(batch, requests, buckets, step, pads_logits=buckets.pads_requests)
    before = deepcopy(last.arrays) if last is not None else None
    moved = continued_step(last, batch, requests) if last is not None else None
    if moved is not None:
        compare(moved, made)
        assert last is not None
        compare(last.arrays, before)
        num_tokens = made.arrays.num_tokens
        np.testing.assert_array_equal(
            requests.last_token_ids(moved.sampled_rows, num_tokens),
            requests.token_ids(step, made.arrays.last_tokens, num_tokens),
        )
    requests.append_sampled(made.sampled_rows, made.sampled_states, change)
    tokens = [[traffic.random.randrange(100)] for _ in made.sampled_states]
    requests.fill_sampled(change, tokens)
    requests.settle(change)
    requests.check_integrity()
    return moved or made


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([Buckets(), Buckets((), (2, 4, 8)), Buckets((1, 8, 64), (1, 8))]),
    st.sampled_from([SAMPLINGS[:1], SAMPLINGS]),
)
def test_continued_step_any_run_equals_one_made_anew(seed, buckets, samplings):
    """Moving a step on by a token gives what making it anew does, and leaves the old one whole."""
    traffic = Traffic(Random(seed), samplings)
    last = None
    for _ in range(30):
        last = run_step(traffic, buckets, last, goes_on=traffic.random.random() < 0.85)


def test_continued_step_of_pure_decode_is_taken():
    """The cheap way is the one that decode steps go; without it nothing above compares."""
    traffic = Traffic(Random(1), SAMPLINGS)
    last, num_moved = None, 0
    for _ in range(40):
        before = last
        last = run_step(traffic, Buckets(), last, goes_on=True)
        num_moved += before is not None and last.logits is before.logits
    assert num_moved > 20


def test_continued_step_after_guesses_or_masks_is_made_anew():
    """Guesses and masks belong to one step alone."""
    traffic = Traffic(Random(2), SAMPLINGS[:1])
    last = run_step(traffic, Buckets(), None, goes_on=False)
    while not last.is_pure_decode:
        last = run_step(traffic, Buckets(), last, goes_on=True)
    batch = traffic.goes_on()
    assert batch is not None
    name = batch.request_ids[0]
    masked = StepBatch(**{**_fields(batch), "token_masks": {name: b"\xff" * 16}})
    guessed = StepBatch(**{**_fields(batch), "draft_token_ids": {name: [1]}})
    assert continued_step(last, masked, traffic.requests) is None
    assert continued_step(last, guessed, traffic.requests) is None


def _fields(batch: StepBatch) -> dict[str, object]:
    return {name: getattr(batch, name) for name in batch.__struct_fields__}
