"""A slow and obvious device, and a house around the scheduler that believes nothing.

The device has a real cache: in every slot it keeps what was written there, and before it samples it looks at every
slot that attention would read. Whoever was given a wrong block, a stale prefix, or a block that another one
still uses, is found at once.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass, field, replace

import pytest
from msgspec.msgpack import decode, encode

from quire.core.errors import DeviceOutOfMemory
from quire.core.interface.worker import (
    NULL_BLOCK,
    CacheGroup,
    CachePlan,
    PositionLogprobs,
    SamplingSpec,
    StepBatch,
    StepResult,
)
from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.request import FinishReason, RequestSpec, RequestUpdate
from quire.core.scheduler.scheduler import Scheduler
from quire.core.scheduler.settings import SchedulerSettings

VOCAB_SIZE = 17
GARBAGE = ("garbage", "garbage")


def sample(history: list[int], seed: int) -> int:
    """The token after a history: depends on all of it, and on nothing else."""
    return zlib.crc32(bytes(history), seed) % VOCAB_SIZE


def logprob_at(history: list[int], token: int) -> PositionLogprobs:
    """A made-up log-probability that names its place, so that a mix-up shows."""
    value = -float(zlib.crc32(bytes(history)) % 1000)
    return PositionLogprobs(
        token_id=token, logprob=value, rank=1, top_ids=[token], top_logprobs=[value]
    )


@dataclass(frozen=True)
class Outcome:
    """How a request ends when it is alone in the world."""

    tokens: list[int]
    reason: FinishReason
    stop_reason: int | None


def run_alone(spec: RequestSpec, max_model_len: int) -> Outcome:
    """The rules of stopping, written down a second time."""
    tokens: list[int] = []
    while True:
        token = sample(spec.prompt_token_ids + tokens, spec.sampling.seed)
        tokens.append(token)
        if len(tokens) >= spec.sampling.min_tokens:
            if token in spec.eos_token_ids:
                return Outcome(tokens, FinishReason.STOP, None)
            if token in spec.stop_token_ids:
                return Outcome(tokens, FinishReason.STOP, token)
        if (
            len(tokens) == spec.max_tokens
            or len(spec.prompt_token_ids) + len(tokens) == max_model_len
        ):
            return Outcome(tokens, FinishReason.LENGTH, None)


@dataclass
class KnownRequest:
    """What the device remembers of a request."""

    tokens: list[int]
    num_prompt: int
    num_computed: int
    tables: list[list[int]]
    sampling: SamplingSpec
    is_off_track: bool = False
    """Steps in flight were scheduled before the request failed or brought several tokens: what they do is thrown away."""


@dataclass
class Mischief:
    """What goes wrong, decided by the number of the step or the request."""

    error_every: int = 0
    """Every so-many-th (request, step) fails alone."""
    oom_steps: frozenset[int] = frozenset()
    oom_above: int | None = None
    """Steps of more tokens do not fit the device's memory."""
    oom_is_late: bool = False
    """The device had taken in the batch, and written rubbish, when it failed."""
    speculate_every: int = 0
    """Every so-many-th sampling brings several tokens."""


class RecordingDevice:
    """Executes batches, one after the other, with a cache of (history, salt) for each slot."""

    def __init__(self, groups, plan, settings, mischief: Mischief, *, has_depth: bool):
        self.groups = groups
        self.plan = plan
        self.settings = settings
        self.mischief = mischief
        self.has_depth = has_depth
        self.requests: dict[str, KnownRequest] = {}
        self.salts: dict[str, str | None] = {}
        self.slots = [defaultdict(lambda: GARBAGE) for _ in groups]
        self.num_sampled = 0
        self.num_touched = 0
        self.num_guessed_right = 0
        self.may_be_unknown: set[str] = set()
        self.cached_tokens_seen: list[int] = []

    def execute(self, batch: StepBatch) -> StepResult:
        """One step; raises DeviceOutOfMemory where the mischief says so."""
        fails = batch.step_id in self.mischief.oom_steps or (
            self.mischief.oom_above is not None and batch.num_tokens > self.mischief.oom_above
        )
        if fails and not self.mischief.oom_is_late:
            self.may_be_unknown.update(new.request_id for new in batch.new_requests)
            raise DeviceOutOfMemory("no room")
        self._take_in(batch)
        if fails:
            for index in range(len(batch.request_ids)):
                self._write(batch, index, spoil=True)
            raise DeviceOutOfMemory("no room")
        sampled, logprobs, errors, prompt_logprobs = [], [], {}, {}
        for index, request_id in enumerate(batch.request_ids):
            self.num_touched += 1
            request = self.requests[request_id]
            every = self.mischief.error_every
            if every and self.num_touched % every == 0:
                self._write(batch, index, spoil=True)
                errors[request_id] = "nan"
                request.is_off_track = True
                sampled.append([])
                logprobs.append(None)
                continue
            self._write(batch, index)
            if not request.is_off_track:
                self._read(batch, index)
            entries = self._prompt_logprobs(batch, index)
            if entries:
                prompt_logprobs[request_id] = entries
            before = len(request.tokens)
            guesses = batch.draft_token_ids.get(request_id, [])
            tokens = self._sample(request, guesses) if batch.samples[index] else []
            request.num_computed += max(0, len(tokens) - 1) if guesses else 0
            sampled.append(tokens)
            logprobs.append(
                [logprob_at(request.tokens[: before + i], token) for i, token in enumerate(tokens)]
                if tokens and request.sampling.num_logprobs is not None
                else None
            )
        return StepResult(
            step_id=batch.step_id,
            sampled_token_ids=sampled,
            logprobs=logprobs if any(logprobs) else None,
            prompt_logprobs=prompt_logprobs,
            errors=errors,
        )

    def _take_in(self, batch: StepBatch) -> None:
        for request_id in batch.finished_request_ids:
            if request_id in self.may_be_unknown:
                self.requests.pop(request_id, None)
                self.may_be_unknown.discard(request_id)
            else:
                del self.requests[request_id]
        for new in batch.new_requests:
            assert new.request_id not in self.requests, f"{new.request_id} is brought twice"
            assert new.request_id in batch.request_ids
            self.may_be_unknown.discard(new.request_id)
            self.cached_tokens_seen.append(new.num_computed_tokens)
            self.requests[new.request_id] = KnownRequest(
                tokens=new.token_ids,
                num_prompt=new.num_prompt_tokens,
                num_computed=new.num_computed_tokens,
                tables=new.block_ids,
                sampling=new.sampling,
            )
        assert len(set(batch.request_ids)) == len(batch.request_ids)
        assert len(self.requests) <= self.settings.max_num_seqs
        assert batch.num_tokens <= self.settings.max_num_batched_tokens
        self._advance(batch)

    def _advance(self, batch: StepBatch) -> None:
        new_ids = {new.request_id for new in batch.new_requests}
        columns = zip(
            batch.request_ids,
            batch.num_new_tokens,
            batch.num_computed_tokens,
            batch.new_block_ids,
            batch.samples,
            strict=True,
        )
        for request_id, num_new, num_computed, blocks, samples in columns:
            request = self.requests[request_id]
            assert num_new >= 1
            assert num_computed == request.num_computed
            if blocks is not None:
                assert request_id not in new_ids
                for table, added in zip(request.tables, blocks, strict=True):
                    table.extend(added)
            guesses = batch.draft_token_ids.get(request_id, [])
            end = num_computed + num_new - len(guesses)
            if not request.is_off_track:
                assert end <= len(request.tokens), "tokens are computed that nobody knows"
                assert samples == (end == len(request.tokens))
                assert samples or not guesses
            request.num_computed = end

    def _write(self, batch: StepBatch, index: int, *, spoil: bool = False) -> None:
        request_id = batch.request_ids[index]
        request = self.requests[request_id]
        start = batch.num_computed_tokens[index]
        text = request.tokens + batch.draft_token_ids.get(request_id, [])
        for position in range(start, start + batch.num_new_tokens[index]):
            content = (bytes(text[: position + 1]), self.salts[request_id])
            for group, table, slots in zip(self.groups, request.tables, self.slots, strict=True):
                block = table[position // group.block_size]
                assert block != NULL_BLOCK, f"{request_id} writes to nobody's block"
                offset = 0 if group.kind == "recurrent" else position % group.block_size
                if group.kind == "recurrent" and position > 0 and not spoil:
                    self._check_state(request_id, group, table, slots, position - 1)
                slots[block, offset] = GARBAGE if spoil else content

    def _check_state(self, request_id: str, group, table, slots, position: int) -> None:
        """A recurrent layer goes on from the state after `position`, which its block must hold."""
        request = self.requests[request_id]
        if request.is_off_track:
            return
        found = slots[table[position // group.block_size], 0]
        wanted = (bytes(request.tokens[: position + 1]), self.salts[request_id])
        assert found == wanted, f"{request_id} goes on from {found} at {position}, not {wanted}"

    def _read(self, batch: StepBatch, index: int) -> None:
        """Looks at everything that any token of the step sees."""
        request_id = batch.request_ids[index]
        request = self.requests[request_id]
        start = batch.num_computed_tokens[index]
        for group, table, slots in zip(self.groups, request.tables, self.slots, strict=True):
            if group.kind == "recurrent":
                continue
            first = max(0, start - group.window + 1) if group.window is not None else 0
            guesses = len(batch.draft_token_ids.get(request_id, []))
            for position in range(first, start + batch.num_new_tokens[index] - guesses):
                block = table[position // group.block_size]
                found = slots[block, position % group.block_size]
                wanted = (bytes(request.tokens[: position + 1]), self.salts[request_id])
                assert found == wanted, (
                    f"{request_id} reads {found} at {position} in block {block} of {group.name}, "
                    f"not {wanted}"
                )

    def _sample(self, request: KnownRequest, guesses: list[int]) -> list[int]:
        if guesses:
            return self._judge(request, guesses)
        self.num_sampled += 1
        every = self.mischief.speculate_every
        count = 3 if every and self.num_sampled % every == 0 else 1
        request.is_off_track |= count > 1 and self.has_depth
        tokens = []
        for _ in range(count):
            tokens.append(sample(request.tokens, request.sampling.seed))
            request.tokens.append(tokens[-1])
        return tokens

    def _judge(self, request: KnownRequest, guesses: list[int]) -> list[int]:
        """Tokens as long as they are what was guessed, and the first that is not."""
        tokens = []
        for guess in [*guesses, None]:
            tokens.append(sample(request.tokens, request.sampling.seed))
            request.tokens.append(tokens[-1])
            if tokens[-1] != guess:
                break
        self.num_guessed_right += len(tokens) - 1
        return tokens

    def _prompt_logprobs(self, batch: StepBatch, index: int) -> list[PositionLogprobs]:
        request = self.requests[batch.request_ids[index]]
        if request.sampling.num_prompt_logprobs is None:
            return []
        start = batch.num_computed_tokens[index]
        end = min(start + batch.num_new_tokens[index], request.num_prompt - 1)
        return [
            logprob_at(request.tokens[: position + 1], request.tokens[position + 1])
            for position in range(start, end)
        ]


@dataclass
class Story:
    """All that came of one request."""

    spec: RequestSpec
    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    last: RequestUpdate | None = None

    @property
    def reason(self) -> FinishReason | None:
        return self.last.finish_reason if self.last else None

    def take(self, update: RequestUpdate) -> None:
        assert self.reason is None, f"{self.spec.request_id} goes on after its end: {update}"
        self.tokens += update.new_token_ids
        self.logprobs += update.logprobs or []
        self.prompt_logprobs += update.prompt_logprobs or []
        self.last = update


class Prophet:
    """Guesses what will be sampled, now and then with one guess that is wrong."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def guess(self, token_ids: list[int], limit: int) -> list[int]:
        text = list(token_ids)
        guesses = []
        for number in range(limit):
            token = sample(text, self.seed)
            is_wrong = (len(token_ids) + number) % 5 == 3
            guesses.append((token + 1) % VOCAB_SIZE if is_wrong else token)
            text.append(guesses[-1])
        return guesses


class House:
    """Scheduler, cache and device, with up to `depth` steps in flight; checks everything after every step."""

    def __init__(
        self,
        *,
        groups,
        num_blocks,
        settings: SchedulerSettings,
        depth: int = 1,
        is_lazy: bool = False,
        mischief: Mischief | None = None,
        enable_prefix_caching: bool = True,
        policy=None,
    ):
        plan = CachePlan(num_blocks=list(num_blocks))
        self.settings = settings
        self.cache = KVCacheManager(groups, plan, enable_prefix_caching=enable_prefix_caching)
        self.scheduler = Scheduler(settings, self.cache, clock=lambda: 1.0, policy=policy)
        self.device = RecordingDevice(
            groups, plan, settings, mischief or Mischief(), has_depth=depth > 1
        )
        self.depth = depth
        self.is_lazy = is_lazy
        self.in_flight: list[tuple[StepBatch, StepResult | Exception | None]] = []
        self.stories: dict[str, Story] = {}
        self.closed_stories: list[Story] = []
        self.batches: list[StepBatch] = []
        self.num_failed = 0

    def add(self, spec: RequestSpec) -> None:
        self.scheduler.add(spec)
        if spec.request_id in self.stories:
            self.closed_stories.append(self.stories[spec.request_id])
        self.stories[spec.request_id] = Story(spec)
        self.device.salts[spec.request_id] = spec.cache_salt
        request = self.scheduler._book.live[spec.request_id]
        if request.lookup is not None:
            request.lookup = Prophet(spec.sampling.seed)

    def abort(self, *request_ids: str) -> list[RequestUpdate]:
        updates = self.scheduler.abort(request_ids)
        self._take(updates)
        return updates

    def submit(self) -> StepBatch | None:
        """Schedules one step and gives it to the device."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self._check_no_block_is_taken_from_the_device(batch)
            self._check_lengths(batch)
            # The device makes lists of the batch its own and appends to them; what was sent is kept as a record.
            self.batches.append(decode(encode(batch), type=StepBatch))
            # A lazy device looks at the batch when its result is wanted: whatever the scheduler changes in it shows.
            self.in_flight.append((batch, None if self.is_lazy else self._execute(batch)))
        self.check()
        return batch

    def _execute(self, batch: StepBatch) -> StepResult | Exception:
        if any(isinstance(result, Exception) for _, result in self.in_flight):
            return RuntimeError("a step before it failed")
        try:
            return self.device.execute(batch)
        except DeviceOutOfMemory as error:
            return error

    def collect(self) -> None:
        """Waits for the oldest step."""
        batch, result = self.in_flight.pop(0)
        if result is None:
            result = self._execute(batch)
        if isinstance(result, Exception):
            self.num_failed += 1
            for later, _ in self.in_flight:
                # Whether the device took these in or not is its own affair.
                self.device.may_be_unknown.update(later.request_ids, later.finished_request_ids)
            self.device.may_be_unknown.update(batch.request_ids, batch.finished_request_ids)
            self.in_flight.clear()
            self._take(self.scheduler.fail_step(batch, str(result)))
        else:
            self._take(self.scheduler.update(batch, result))
        self.check()

    def step(self) -> None:
        """As the engine does: fill the pipeline, then wait for one result."""
        while len(self.in_flight) < self.depth and self.submit() is not None:
            pass
        if self.in_flight:
            self.collect()

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left to do; a request that starves is found by the bound."""
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                break
            self.step()
        assert not self.scheduler.has_work(), f"still at work after {max_steps} steps"
        self.check_empty()

    def _take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            self.stories[update.request_id].take(update)

    def _check_no_block_is_taken_from_the_device(self, batch: StepBatch) -> None:
        """No step in flight writes to a block that this batch hands out."""
        written = {
            (group, block)
            for earlier, _ in self.in_flight
            for group, block in self._fresh_blocks(earlier)
        }
        taken = [block for block in self._fresh_blocks(batch) if block in written]
        assert not taken, f"blocks {taken} are given away while a step in flight writes to them"

    def _check_lengths(self, batch: StepBatch) -> None:
        """No token is computed from which none may follow."""
        columns = zip(
            batch.request_ids, batch.num_computed_tokens, batch.num_new_tokens, strict=True
        )
        for request_id, num_computed, num_new in columns:
            spec = self.stories[request_id].spec
            limit = min(len(spec.prompt_token_ids) + spec.max_tokens, self.settings.max_model_len)
            assert num_computed + num_new < limit, f"{request_id} computes past its end"

    def _fresh_blocks(self, batch: StepBatch):
        for blocks in batch.new_block_ids:
            for group, added in enumerate(blocks or []):
                yield from ((group, block) for block in added)
        for new in batch.new_requests:
            for group, table in enumerate(new.block_ids):
                start = new.num_computed_tokens // self.device.groups[group].block_size
                yield from ((group, block) for block in table[start:])

    def check(self) -> None:
        self.scheduler.check_integrity()

    def check_empty(self) -> None:
        """Nothing is left behind."""
        assert not self.in_flight
        assert self.cache.num_free_blocks == [count - 1 for count in self.device.plan.num_blocks]
        assert self.cache.usage == 0.0
        self.cache.check_integrity(set())
        for story in (*self.stories.values(), *self.closed_stories):
            assert story.reason is not None, f"{story.spec.request_id} never ended"

    def check_output(self, story: Story) -> None:
        """The output is that of the request alone, or the part of it before it was ended from outside."""
        alone = run_alone(story.spec, self.settings.max_model_len)
        if story.reason in (FinishReason.ABORT, FinishReason.ERROR):
            assert story.tokens == alone.tokens[: len(story.tokens)]
        else:
            assert story.tokens == alone.tokens
            assert story.reason is alone.reason
            assert story.last.stop_reason == alone.stop_reason
        self._check_logprobs(story)

    def _check_logprobs(self, story: Story) -> None:
        prompt, sampling = story.spec.prompt_token_ids, story.spec.sampling
        history = prompt + story.tokens
        if sampling.num_logprobs is not None:
            assert story.logprobs == [
                logprob_at(history[:place], history[place])
                for place in range(len(prompt), len(history))
            ]
        if sampling.num_prompt_logprobs is not None:
            wanted = [logprob_at(prompt[:place], prompt[place]) for place in range(1, len(prompt))]
            if story.tokens:
                assert story.prompt_logprobs == wanted
            else:
                assert story.prompt_logprobs == wanted[: len(story.prompt_logprobs)]
        else:
            assert story.prompt_logprobs == []


class Kit:
    """What the tests build houses with."""

    House = House
    Mischief = Mischief
    sample = staticmethod(sample)
    run_alone = staticmethod(run_alone)

    @staticmethod
    def group(window: int | str | None = None, block_size: int = 4) -> CacheGroup:
        """Layers that see all, a window of so many tokens, or `recurrent` ones."""
        kind = "causal" if window is None else "sliding_window"
        return CacheGroup(
            name=f"{kind}_{window}_{block_size}",
            kind=window if isinstance(window, str) else kind,
            window=window if isinstance(window, int) else None,
            block_size=block_size,
            num_layers=1,
            bytes_per_block=1,
        )

    @staticmethod
    def settings(**changes) -> SchedulerSettings:
        base = SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=32, max_model_len=64)
        return replace(base, **changes)

    @staticmethod
    def spec(
        request_id="a", prompt=(1, 2, 3), max_tokens=4, *, sampling=None, **changes
    ) -> RequestSpec:
        return RequestSpec(
            request_id=request_id,
            prompt_token_ids=list(prompt),
            sampling=sampling or SamplingSpec(),
            max_tokens=max_tokens,
            **changes,
        )

    def house(self, *, groups=None, num_blocks=(65,), **options) -> House:
        """One full group of 64 blocks of 4 tokens, unless said otherwise; settings by their own names."""
        names = SchedulerSettings.__dataclass_fields__
        settings = self.settings(**{k: options.pop(k) for k in list(options) if k in names})
        policy = options.pop("policy_object", None)
        return House(
            groups=groups or [self.group()],
            num_blocks=num_blocks,
            settings=settings,
            policy=policy,
            **options,
        )


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Builders of houses and requests."""
    return Kit()
