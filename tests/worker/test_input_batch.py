"""The columns of the running requests against plain lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.errors import QuireError
from quire.core.interface import NULL_BLOCK, NewRequest, SamplingSpec, StepBatch
from quire.core.worker.buckets import Buckets
from quire.core.worker.input_batch import InputBatch
from quire.core.worker.logits_processors import LogitsProcessors
from quire.core.worker.step_arrays import make_step_arrays

BLOCK_SIZES = (4, 8)
MAX_LEN = 40
MAX_REQUESTS = 5
VOCAB = 100


@dataclass
class SlowRequest:
    """A request in plain lists."""

    tokens: list[int]
    num_prompt: int
    computed: int = 0
    blocks: list[list[int]] = field(default_factory=lambda: [[] for _ in BLOCK_SIZES])


@dataclass
class SlowBatch:
    """What the arrays of a step must be, one token at a time."""

    requests: dict[str, SlowRequest]

    def flat(self, batch: StepBatch):
        tokens, positions, slots = [], [], [[] for _ in BLOCK_SIZES]
        for name, begin, count in zip(
            batch.request_ids, batch.num_computed_tokens, batch.num_new_tokens, strict=True
        ):
            request = self.requests[name]
            for position in range(begin, begin + count):
                tokens.append(request.tokens[position])
                positions.append(position)
                for group, size in enumerate(BLOCK_SIZES):
                    block = request.blocks[group][position // size]
                    slots[group].append(block * size + position % size)
        return tokens, positions, slots


def make_batch(capacity: int = 2 * MAX_REQUESTS) -> InputBatch:
    return InputBatch(
        capacity=capacity,
        max_model_len=MAX_LEN,
        block_sizes=BLOCK_SIZES,
        vocab_size=VOCAB,
        processors=LogitsProcessors(),
    )


class Simulation:
    """Random steps, applied to both."""

    def __init__(self, random: Random, buckets: Buckets) -> None:
        self.random = random
        self.buckets = buckets
        self.slow = SlowBatch({})
        self.fast = make_batch()
        self.finished: list[str] = []
        self.num_made = 0
        self.preempted: list[tuple[str, SlowRequest]] = []

    def step(self) -> None:
        batch = self.make_step()
        if batch is None:
            return
        if self.random.random() < 0.3:
            self.apply_and_undo(batch)
        change = self.fast.apply(batch)
        step = self.fast.scheduled(batch)
        arrays = make_step_arrays(step, self.fast.block_tables, BLOCK_SIZES, self.buckets)
        self.compare(batch, step, arrays)
        sampled = np.flatnonzero(batch.samples)
        rows = step.rows[sampled]
        self.fast.append_sampled(rows, self.fast.states(rows), change)
        tokens = [self.random.randrange(VOCAB) for _ in sampled]
        self.fast.fill_sampled(change, [[token] for token in tokens])
        self.fast.settle(change)
        for index, token in zip(sampled.tolist(), tokens, strict=True):
            self.slow.requests[batch.request_ids[index]].tokens.append(token)
        self.fast.check_integrity()
        self.finish_some()

    def apply_and_undo(self, batch: StepBatch) -> None:
        before = dict(self.fast._row_of)
        rows = sorted(before.values())
        tables = [table[rows] for table in self.fast.block_tables]
        change = self.fast.apply(batch)
        step = self.fast.scheduled(batch)
        sampled = step.rows[np.flatnonzero(batch.samples)]
        self.fast.append_sampled(sampled, self.fast.states(sampled), change)
        self.fast.undo(change)
        assert self.fast._row_of == before
        for table, old in zip(self.fast.block_tables, tables, strict=True):
            np.testing.assert_array_equal(table[rows], old)
        self.fast.check_integrity()

    def make_step(self) -> StepBatch | None:
        new = []
        while len(self.slow.requests) < MAX_REQUESTS and self.random.random() < 0.5:
            new.append(self.make_request())
        names = [name for name in self.slow.requests if self.random.random() < 0.8 or name in new]
        self.random.shuffle(names)
        counts, blocks = [], []
        for name in names:
            request = self.slow.requests[name]
            missing = len(request.tokens) - request.computed
            counts.append(self.random.randint(1, missing))
            grown = self.grow(request, request.computed + counts[-1])
            blocks.append(grown if any(grown) and name not in new else None)
        if not names:
            return None
        requests = [self.slow.requests[name] for name in names]
        batch = StepBatch(
            step_id=1,
            finished_request_ids=self.finished,
            new_requests=[self.describe(name) for name in new],
            request_ids=names,
            num_new_tokens=counts,
            num_computed_tokens=[request.computed for request in requests],
            new_block_ids=blocks,
            samples=[
                request.computed + count == len(request.tokens)
                for request, count in zip(requests, counts, strict=True)
            ],
        )
        self.finished = []
        for request, count in zip(requests, counts, strict=True):
            request.computed += count
        return batch

    def make_request(self) -> str:
        if self.preempted and self.random.random() < 0.5:
            name, request = self.preempted.pop()
        else:
            length = self.random.randint(1, 20)
            tokens = [self.random.randrange(VOCAB) for _ in range(length)]
            name, request = f"r{self.num_made}", SlowRequest(tokens, self.random.randint(1, length))
            self.num_made += 1
        self.slow.requests[name] = request
        return name

    def describe(self, name: str) -> NewRequest:
        request = self.slow.requests[name]
        return NewRequest(
            request_id=name,
            token_ids=list(request.tokens),
            num_prompt_tokens=request.num_prompt,
            num_computed_tokens=request.computed,
            block_ids=[list(blocks) for blocks in request.blocks],
            sampling=SamplingSpec(repetition_penalty=1.5),
        )

    def grow(self, request: SlowRequest, num_tokens: int) -> list[list[int]]:
        new = []
        for size, blocks in zip(BLOCK_SIZES, request.blocks, strict=True):
            missing = max(0, -(-num_tokens // size) - len(blocks))
            new.append([self.random.randint(1, 200) for _ in range(missing)])
            blocks.extend(new[-1])
        return new

    def finish_some(self) -> None:
        for name, request in list(self.slow.requests.items()):
            is_full = len(request.tokens) >= MAX_LEN
            if is_full or self.random.random() < 0.15:
                del self.slow.requests[name]
                self.finished.append(name)
                if not is_full and self.random.random() < 0.5:
                    preempted = SlowRequest(request.tokens, request.num_prompt)
                    self.preempted.append((name, preempted))

    def compare(self, batch: StepBatch, step, arrays) -> None:
        tokens, positions, slots = self.slow.flat(batch)
        num_tokens = len(tokens)
        flat = self.fast.token_ids(step, arrays.last_tokens, arrays.num_tokens)
        assert flat[:num_tokens].tolist() == tokens
        assert arrays.positions[:num_tokens].tolist() == positions
        assert not arrays.positions[num_tokens:].any()
        ends = np.cumsum(batch.num_new_tokens)
        assert (arrays.last_tokens + 1).tolist() == ends.tolist()
        assert arrays.query_start_loc[-1] == arrays.num_tokens
        assert arrays.max_seq_len == arrays.seq_lens.max()
        assert arrays.max_query_len == np.diff(arrays.query_start_loc).max()
        for group, size in enumerate(BLOCK_SIZES):
            assert arrays.slot_mappings[group][:num_tokens].tolist() == slots[group]
            self.compare_tables(batch, arrays, group, size)
        self.compare_padding(batch, arrays)
        for index, name in enumerate(batch.request_ids):
            seen = self.fast.states(step.rows[index : index + 1])[0].seen
            request = self.slow.requests[name]
            counts = dict.fromkeys(request.tokens, 0)
            for token in request.tokens[request.num_prompt :]:
                counts[token] += 1
            assert (
                dict(zip(seen.token_ids.tolist(), seen.output_counts.tolist(), strict=True))
                == counts
            )

    def compare_padding(self, batch: StepBatch, arrays) -> None:
        """Padding writes where attention will look for it: the last request's own next slots, or nobody's."""
        owner = np.repeat(np.arange(arrays.num_requests), np.diff(arrays.query_start_loc))
        last = len(batch.request_ids) - 1
        blocks = self.slow.requests[batch.request_ids[last]].blocks
        for token in range(sum(batch.num_new_tokens), arrays.num_tokens):
            request = owner[token]
            first = arrays.query_start_loc[request + 1] - arrays.seq_lens[request]
            position = token - first
            for group, size in enumerate(BLOCK_SIZES):
                index = position // size
                known = request == last and index < len(blocks[group])
                block = blocks[group][index] if known else NULL_BLOCK
                assert arrays.slot_mappings[group][token] == block * size + position % size

    def compare_tables(self, batch: StepBatch, arrays, group: int, size: int) -> None:
        table = arrays.block_tables[group]
        assert table.shape[1] >= -(-arrays.max_seq_len // size)
        for index, name in enumerate(batch.request_ids):
            end = batch.num_computed_tokens[index] + batch.num_new_tokens[index]
            blocks = self.slow.requests[name].blocks[group][: -(-end // size)]
            assert table[index, : len(blocks)].tolist() == blocks
        assert (table[len(batch.request_ids) :] == NULL_BLOCK).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(), (1, 8, 32, 128)]), st.booleans())
def test_input_batch_any_run_equals_plain_lists(seed, token_buckets, with_request_buckets):
    """Adding, growing, chunking, preempting, finishing and undoing leave the right arrays."""
    buckets = Buckets(token_buckets, (2, 4, 8) if with_request_buckets else ())
    simulation = Simulation(Random(seed), buckets)
    for _ in range(20):
        simulation.step()


def new_request(name: str, tokens: list[int], **sampling: object) -> NewRequest:
    return NewRequest(
        request_id=name,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        num_computed_tokens=0,
        block_ids=[[1] * -(-len(tokens) // size) for size in BLOCK_SIZES],
        sampling=SamplingSpec(**sampling),
    )


def one_step(name: str, count: int, *, computed: int = 0, new: list[NewRequest] = ()) -> StepBatch:
    return StepBatch(
        step_id=1,
        finished_request_ids=[],
        new_requests=list(new),
        request_ids=[name],
        num_new_tokens=[count],
        num_computed_tokens=[computed],
        new_block_ids=[None],
        samples=[True],
    )


def test_apply_unknown_request_is_refused_and_changes_nothing():
    """An engine that forgot to bring a request is told so, and the step has not half happened."""
    requests = make_batch()
    batch = one_step("b", 1, new=[new_request("a", [1, 2])])
    with pytest.raises(QuireError, match="unknown to the worker: b"):
        requests.apply(batch)
    assert len(requests) == 0
    requests.check_integrity()


def test_scheduled_more_tokens_than_there_are_is_refused():
    """A step past a request's end would read what was never written."""
    requests = make_batch()
    requests.apply(one_step("a", 3, new=[new_request("a", [1, 2])]))
    with pytest.raises(QuireError, match="has 2 tokens; the step asks for 3 from 0"):
        requests.scheduled(one_step("a", 3))


def test_apply_too_many_blocks_is_refused():
    """A block table is never written beyond its row."""
    requests = make_batch()
    too_many = NewRequest(
        request_id="a",
        token_ids=[1],
        num_prompt_tokens=1,
        num_computed_tokens=0,
        block_ids=[[1] * 11, [1]],
        sampling=SamplingSpec(),
    )
    with pytest.raises(QuireError, match="11 blocks in cache group 0"):
        requests.apply(one_step("a", 1, new=[too_many]))
    requests.check_integrity()


def test_apply_more_requests_than_rows_is_refused():
    """Rows are never shared."""
    requests = make_batch(capacity=1)
    requests.apply(one_step("a", 1, new=[new_request("a", [1])]))
    with pytest.raises(QuireError, match="one more than the worker was built for"):
        requests.apply(one_step("b", 1, new=[new_request("b", [1])]))
    requests.check_integrity()


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        ([1, VOCAB], {}, "token_ids holds token 100"),
        ([1], {"logit_bias": ((-1, 2.0),)}, "logit_bias holds token -1"),
        ([1], {"allowed_token_ids": (3, 200)}, "allowed_token_ids holds token 200"),
        ([1], {"bad_words": ((1, 2), (150,))}, "bad_words holds token 150"),
        (
            [1],
            {"min_tokens": 1, "min_tokens_forbids": (101,)},
            "min_tokens_forbids holds token 101",
        ),
        ([1], {"logits_processors": ("absent",)}, "no logits processor is registered as 'absent'"),
    ],
)
def test_new_request_out_of_bounds_becomes_its_own_problem(tokens, sampling, message):
    """What would break the step for all is kept from the device and reported for the one."""
    requests = make_batch()
    batch = one_step("a", len(tokens), new=[new_request("a", tokens, **sampling)])
    requests.apply(batch)
    step = requests.scheduled(batch)
    (state,) = requests.states(step.rows)
    assert message in state.problem
    assert max(state.tokens) < VOCAB


def test_token_on_its_way_is_zero_until_it_is_filled_in():
    """Steps are prepared before the tokens of the last one are known; steps settle in order."""
    requests = make_batch()
    change = requests.apply(
        one_step("a", 2, new=[new_request("a", [7, 8], repetition_penalty=2.0)])
    )
    rows = requests.scheduled(one_step("a", 2)).rows
    requests.append_sampled(rows, requests.states(rows), change)
    second = one_step("a", 1, computed=2)
    later = requests.apply(second)
    step = requests.scheduled(second)
    assert requests.token_ids(step, np.array([0]), 1).tolist() == [0]
    assert requests.on_their_way(step).tolist() == [0]
    assert requests.must_settle(["a", "unheard-of"])
    requests.append_sampled(rows, requests.states(rows), later)
    requests.fill_sampled(change, [[42]])
    requests.settle(change)
    (state,) = requests.states(rows)
    assert state.tokens.tolist() == [7, 8, 42, 0]
    assert requests.on_their_way(requests.scheduled(one_step("a", 1, computed=3))).tolist() == [0]
    requests.undo(later)
    assert requests.on_their_way(step).tolist() == []
    assert requests.token_ids(step, np.array([0]), 1).tolist() == [42]
    assert not requests.must_settle(["a"])
    requests.check_integrity()
