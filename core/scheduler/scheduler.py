"""Decides which tokens each step computes, and takes in what came of it.

`schedule` may be called again while earlier steps are in flight. It then counts on one token from
every step that samples; what the token is, `update` learns later. A request that ends meanwhile
leaves its blocks to the steps in flight that still write to them, and their results for it are
thrown away.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable

from msgspec.structs import replace

from quire.core.errors import RequestError
from quire.core.interface.worker import NewRequest, StepBatch, StepResult
from quire.core.kv_cache.block_table import PrefixHit
from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.intake import (
    features_to_send,
    make_request,
    refuse_what_never_fits,
)
from quire.core.scheduler.outcome import end_at, new_prompt_logprobs, progress
from quire.core.scheduler.policy import SchedulingPolicy, make_policy
from quire.core.scheduler.request import (
    FinishReason,
    Request,
    RequestSpec,
    RequestStatus,
    RequestUpdate,
)
from quire.core.scheduler.request_book import RequestBook
from quire.core.scheduler.settings import SchedulerSettings
from quire.core.scheduler.speculation import guess_ahead
from quire.core.scheduler.statistics import SchedulerStatistics, StepCounts
from quire.core.scheduler.step import StepDraft, StepInFlight

_RUNNING, _FINISHED = RequestStatus.RUNNING, RequestStatus.FINISHED


class Scheduler:
    """Owns the requests. Used by one thread."""

    def __init__(
        self,
        settings: SchedulerSettings,
        cache: KVCacheManager,
        *,
        policy: SchedulingPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._cache = cache
        self._policy = policy or make_policy(settings.policy)
        self._clock = clock
        self._book = RequestBook(cache)
        self._in_flight: deque[StepInFlight] = deque()
        self._num_arrived = 0
        self._step_tokens = settings.max_num_batched_tokens
        self._has_just_failed = False
        self._counts = StepCounts()

    # ------------------------------------------------------------------------ requests come and go

    def add(self, spec: RequestSpec) -> None:
        """Lets a request wait for its turn.

        Raises: RequestError if its id is in use, the queue is full, or it could never run.
        """
        if spec.request_id in self._book.live:
            raise RequestError(
                f"request id {spec.request_id!r} is in use; choose another", param="request_id"
            )
        refuse_what_never_fits(spec, self.settings, self._cache)
        self._refuse_when_full()
        request = make_request(spec, self._num_arrived, self.settings, self._cache)
        request.order_key = self._policy.order_key(request)
        self._num_arrived += 1
        self._book.enter(request)

    def _refuse_when_full(self) -> None:
        limit = self.settings.max_num_queued
        if limit is None:
            return
        num_seats = max(0, self.settings.max_num_seqs - len(self._book.running))
        if len(self._book.waiting) >= limit + num_seats:
            raise RequestError(
                f"{self.num_running} requests run and {self.num_waiting} wait; max_num_queued is "
                f"{limit}; try again later"
            )

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """Ends requests now, steps in flight or not. Ids of no living request are passed over."""
        requests = (self._book.live.get(request_id) for request_id in request_ids)
        return [
            self._book.finish(request, FinishReason.ABORT)
            for request in requests
            if request is not None
        ]

    def complete(self, request_id: str) -> None:
        """Ends a request whose output is whole by its grammar; no step of it may be in flight."""
        request = self._book.live[request_id]
        assert not request.num_in_flight, request
        self._book.finish(request, FinishReason.STOP)

    # ------------------------------------------------------------------------------------- a step

    def schedule(self) -> StepBatch | None:
        """The next step, or None if nothing can be computed before a step in flight is back.

        Ids to forget wait for a step to go with.
        """
        draft = StepDraft(budget=self._step_tokens)
        self._schedule_running(draft)
        if self._book.waiting and not draft.is_short_of_blocks:
            self._admit_waiting(draft)
        if not draft.requests:
            assert self._in_flight or not self._book.live, "requests wait and nothing is in flight"
            return None
        counts = self._counts
        batch = draft.batch(counts.num_steps, self._book.take_ids_to_forget())
        self._in_flight.append(StepInFlight(batch, draft.requests))
        counts.num_steps += 1
        counts.num_scheduled_tokens += batch.num_tokens
        counts.num_guesses += sum(map(len, batch.draft_token_ids.values()))
        return batch

    def _schedule_running(self, draft: StepDraft) -> None:
        """Those who run have the first turn. Flat, since every token passes through here."""
        for request in self._book.running.copy():
            total = request.num_tokens
            if total >= request.max_total_tokens or request.status is not _RUNNING:
                continue  # its last token is on its way, or it was preempted in this pass
            if request.needs_last_token and total > len(request.token_ids):
                continue  # what may follow is known when that token is
            computed = request.num_computed_tokens
            num_new = total - computed
            if num_new > 1:
                num_new = self._next_chunk(request, num_new, draft.budget)
            blocks = None
            if computed + num_new > request.table.capacity:
                blocks = self._grow(request, num_new, draft)
                if blocks is None:
                    continue
            draft.add(request, num_new, blocks)
            if request.lookup is not None and draft.samples[-1]:
                guess_ahead(request, draft, self._cache, self.settings.num_guessed_tokens)
            if draft.budget <= 0:
                break

    def _next_chunk(self, request: Request, num_missing: int, budget: int) -> int:
        num_others = len(self._book.running) - 1 - self._book.running.index(request)
        return self._policy.chunk_size(self._at_most_a_chunk(num_missing), budget, num_others)

    def _at_most_a_chunk(self, num_missing: int) -> int:
        limit = self.settings.max_chunk_tokens
        return num_missing if limit is None else min(num_missing, limit)

    def _grow(self, request: Request, num_new: int, draft: StepDraft) -> list[list[int]] | None:
        """Blocks for the request's next tokens, from others if need be; None: not in this step."""
        gives_back = self._cache.gives_back_early
        if gives_back and not request.num_in_flight:
            self._cache.settle(request.table, request.token_ids, request.num_computed_tokens)
        while not draft.is_waiting_for_blocks:
            blocks = self._cache.allocate(request.table, request.num_computed_tokens + num_new)
            if blocks is not None:
                return blocks
            draft.is_short_of_blocks = True
            if self._book.is_awaiting_blocks or (gives_back and request.num_in_flight):
                # A step in flight brings blocks. Nobody behind takes any, or this one could starve.
                draft.is_waiting_for_blocks = True
                break
            candidates = self._book.running[self._book.running.index(request) :]
            victim = self._policy.choose_victim(candidates)
            self._preempt(victim)
            if victim is request:
                break
        return None

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Those who wait follow in order, as long as seats, tokens and blocks last."""
        num_seats = self.settings.max_num_seqs
        patient: list[Request] = []
        while draft.budget > 0 and len(self._book.running) + len(patient) < num_seats:
            request = self._book.waiting.peek()
            if request is None or request.num_in_flight:
                break  # a preempted request goes on from tokens that a step in flight still brings
            hit = self._find_prefix(request)
            num_missing = request.num_tokens - hit.num_tokens
            if hit.num_pending_tokens and self._policy.waits_for_prefix(
                hit.num_pending_tokens, num_missing
            ):
                patient.append(self._book.waiting.pop())
            elif not self._admit(request, hit, num_missing, draft):
                break
        for request in patient:
            self._book.waiting.push(request)

    def _admit(self, request: Request, hit: PrefixHit, num_missing: int, draft: StepDraft) -> bool:
        num_new = self._first_chunk(request, num_missing, draft)
        if num_new == 0 or not self._cache.admit(
            request.table,
            hit,
            num_tokens=request.num_tokens,
            num_new_tokens=num_new,
            num_spare_blocks=self._num_spare_blocks(),
        ):
            return False
        self._start(request, hit, num_new, draft)
        return True

    def _num_spare_blocks(self) -> int:
        num_running = len(self._book.running)
        return self._policy.num_spare_blocks(num_running) if num_running else 0

    def _find_prefix(self, request: Request) -> PrefixHit:
        if request.wants_prompt_logprobs or request.pooling is not None:
            return self._cache.no_prefix()
        return self._cache.find_prefix(request.table, request.token_ids)

    def _first_chunk(self, request: Request, num_missing: int, draft: StepDraft) -> int:
        """Tokens of an admitted request's first step; 0: it waits."""
        settings = self.settings
        if request.pooling is not None:
            fits = num_missing <= draft.budget or not draft.requests
            return num_missing if fits else 0
        if settings.enable_chunked_prefill or num_missing > settings.max_num_batched_tokens:
            return self._policy.chunk_size(self._at_most_a_chunk(num_missing), draft.budget, 0)
        fits = num_missing <= draft.budget or not draft.requests
        return num_missing if fits else 0

    def _start(self, request: Request, hit: PrefixHit, num_new: int, draft: StepDraft) -> None:
        if request.first_scheduled_time_s is None:
            request.first_scheduled_time_s = self._clock()
            request.num_cached_tokens = hit.num_tokens
        self._book.start(request, hit.num_tokens)
        # Copies: a worker in this process appends to its lists, and so do we to ours.
        draft.new_requests.append(
            NewRequest(
                request_id=request.request_id,
                token_ids=request.token_ids.copy(),
                num_prompt_tokens=request.num_prompt_tokens,
                num_computed_tokens=hit.num_tokens,
                block_ids=[block_ids.copy() for block_ids in request.table.block_ids],
                sampling=request.sampling,
                pooling=request.pooling,
                features=features_to_send(request),
            )
        )
        draft.add(request, num_new, None)

    # --------------------------------------------------------------------------------- its result

    def update(self, batch: StepBatch, result: StepResult) -> list[RequestUpdate]:
        """Takes in the result of the oldest step in flight.

        Requests that only computed are not in the answer. A token that ends nothing takes the flat
        path, since every token passes through here.
        """
        step = self._in_flight.popleft()
        assert step.batch.step_id == batch.step_id == result.step_id, (
            f"step {step.batch.step_id} is next; got batch {batch.step_id}, result {result.step_id}"
        )
        updates: list[RequestUpdate] = []
        is_plain = not (result.errors or result.prompt_logprobs or batch.draft_token_ids)
        logprobs = result.logprobs
        columns = zip(
            step.requests,
            result.sampled_token_ids,
            batch.num_computed_tokens,
            batch.num_new_tokens,
            batch.samples,
            strict=True,
        )
        for index, (request, tokens, computed, num_new, samples) in enumerate(columns):
            token_ids = request.token_ids
            if (
                is_plain
                and samples
                and len(tokens) == 1
                and request.status is _RUNNING
                and tokens[0] not in request.end_token_ids
                and len(token_ids) + 1 < request.max_total_tokens
            ):
                request.num_in_flight -= 1
                if computed + num_new >= request.table.next_settle_at:
                    self._cache.settle(request.table, token_ids, computed + num_new)
                token_ids.append(tokens[0])
                updates.append(progress(request, tokens, logprobs[index] if logprobs else None))
                continue
            update = self._update_one(request, index, step, result)
            if update is not None:
                updates.append(update)
        self._note_success(updates)
        return updates

    def _update_one(
        self, request: Request, index: int, step: StepInFlight, result: StepResult
    ) -> RequestUpdate | None:
        """What one step did to one request, whatever state it is in by now."""
        request.num_in_flight -= 1
        update = None
        if request.status is _FINISHED:
            pass
        elif request.num_stale_steps:
            request.num_stale_steps -= 1
        else:
            update = self._take_in(request, index, step.batch, result)
        if request.status is not _RUNNING:
            self._book.settle(request)
        return update

    def _take_in(
        self, request: Request, index: int, batch: StepBatch, result: StepResult
    ) -> RequestUpdate | None:
        tokens = result.sampled_token_ids[index]
        samples = batch.samples[index]
        error = result.errors.get(request.request_id)
        if request.pooling is not None:
            return self._end_pooled(request, result, error)
        if error is None and bool(tokens) != samples:
            error = (
                f"the worker returned {len(tokens)} tokens where {int(samples)} was to be sampled"
            )
        if error is not None:
            self._cache.distrust(request.table)
            return self._book.finish(request, FinishReason.ERROR, error=error)
        num_computed = batch.num_computed_tokens[index] + batch.num_new_tokens[index]
        guesses = batch.draft_token_ids.get(request.request_id)
        if guesses:
            num_computed += len(tokens) - 1 - len(guesses)
            return self._take_in_guessed(request, tokens, num_computed)
        if num_computed >= request.table.next_settle_at:
            self._cache.settle(request.table, request.token_ids, num_computed)
        prompt_logprobs = new_prompt_logprobs(request, batch.num_computed_tokens[index], result)
        if not tokens:
            if prompt_logprobs is None:
                return None
            return replace(progress(request, []), prompt_logprobs=prompt_logprobs)
        update = self._append_output(request, tokens)
        logprobs = result.logprobs[index] if result.logprobs else None
        if logprobs is None and prompt_logprobs is None:
            return update
        return replace(
            update,
            logprobs=logprobs[: len(update.new_token_ids)] if logprobs else None,
            prompt_logprobs=prompt_logprobs,
        )

    def _end_pooled(self, request: Request, result: StepResult, error: str | None) -> RequestUpdate:
        """The end of a request whose text was computed whole, for numbers."""
        pooled = result.pooled.get(request.request_id)
        if error is None and pooled is None:
            error = "the worker returned no numbers for a text that is pooled"
        if error is not None:
            return self._book.finish(request, FinishReason.ERROR, error=error)
        return replace(self._book.finish(request, FinishReason.STOP), pooled=pooled)

    def _take_in_guessed(
        self, request: Request, tokens: list[int], num_computed: int
    ) -> RequestUpdate:
        """What was guessed right is computed already; the slots of the rest are written again."""
        request.num_computed_tokens = num_computed
        self._counts.num_right_guesses += len(tokens) - 1
        if num_computed >= request.table.next_settle_at:
            self._cache.settle(request.table, [*request.token_ids, *tokens[:-1]], num_computed)
        return self._append_output(request, tokens)

    def _append_output(self, request: Request, tokens: list[int]) -> RequestUpdate:
        """Appends what was sampled, up to the token that ends the request, if one does."""
        token_ids = request.token_ids
        request.num_tokens -= 1  # the token that was counted on; those that came are counted below
        for number, token in enumerate(tokens, 1):
            token_ids.append(token)
            request.num_tokens += 1
            reason, stop_reason = end_at(request, token)
            if reason is not None:
                return self._book.finish(
                    request, reason, new_token_ids=tokens[:number], stop_reason=stop_reason
                )
        if len(tokens) > 1 and request.num_in_flight:
            self._drop_steps_in_flight(request)
        return progress(request, tokens)

    def _drop_steps_in_flight(self, request: Request) -> None:
        """Starts over from the tokens that are known: the steps in flight counted on fewer."""
        request.num_stale_steps = request.num_in_flight
        request.num_tokens = len(request.token_ids)
        if request.status is _RUNNING:
            self._preempt(request)

    def _note_success(self, updates: list[RequestUpdate]) -> None:
        self._counts.num_sampled_tokens += sum(len(update.new_token_ids) for update in updates)
        self._has_just_failed = False
        limit = self.settings.max_num_batched_tokens
        if self._step_tokens < limit:
            self._step_tokens = min(limit, self._step_tokens + max(1, self._step_tokens // 8))

    # ------------------------------------------------------------------------------ when it failed

    def fail_step(self, batch: StepBatch, message: str) -> list[RequestUpdate]:
        """A step did not happen, since the device was out of memory; later ones in flight are void.

        Their requests are preempted, and steps are made smaller: half the tokens at first, growing
        again with every step that succeeds. A step that cannot be smaller is tried once more; if
        it fails again, the one request that it holds ends with `message`. The results of the later
        steps must not be passed to `update`. The worker is told again what to forget, whatever it
        took in of these steps.
        """
        voided = []
        while self._in_flight and self._in_flight[-1].batch.step_id >= batch.step_id:
            voided.append(self._in_flight.pop())
        assert voided, f"step {batch.step_id} is not in flight"
        self._counts.num_failed_steps += 1
        for step in voided:
            self._void(step)
        failed = voided[-1]
        if len(failed.requests) > 1 or self._can_be_split(failed.batch):
            self._step_tokens = max(1, failed.batch.num_tokens // 2)
        elif self._has_just_failed and failed.requests[0].status is not _FINISHED:
            return [self._book.finish(failed.requests[0], FinishReason.ERROR, error=message)]
        self._has_just_failed = True
        return []

    def _void(self, step: StepInFlight) -> None:
        for request, samples in zip(step.requests, step.batch.samples, strict=True):
            request.num_in_flight -= 1
            if request.num_stale_steps:
                request.num_stale_steps -= 1
            elif samples and request.status is not _FINISHED:
                request.num_tokens -= 1
            if request.status is _RUNNING:
                self._preempt(request)
            else:
                self._book.settle(request)
        self._book.forget_again(step.batch.finished_request_ids)

    def _can_be_split(self, batch: StepBatch) -> bool:
        return self.settings.enable_chunked_prefill and batch.num_tokens > 1

    def _preempt(self, request: Request) -> None:
        self._book.preempt(request)
        self._counts.num_preemptions += 1

    # ----------------------------------------------------------------------------------- questions

    @property
    def num_running(self) -> int:
        """Requests that hold blocks and a seat."""
        return len(self._book.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait, preempted ones included."""
        return len(self._book.waiting)

    def has_work(self) -> bool:
        """Whether a request lives or a step is in flight."""
        return bool(self._book.live or self._in_flight)

    def statistics(self) -> SchedulerStatistics:
        """The figures of this moment."""
        counts, prefix = self._counts, self._cache.prefix_statistics
        return SchedulerStatistics(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_steps_in_flight=len(self._in_flight),
            cache_usage=self._cache.usage,
            num_steps=counts.num_steps,
            num_scheduled_tokens=counts.num_scheduled_tokens,
            num_sampled_tokens=counts.num_sampled_tokens,
            num_preemptions=counts.num_preemptions,
            num_failed_steps=counts.num_failed_steps,
            num_guesses=counts.num_guesses,
            num_right_guesses=counts.num_right_guesses,
            num_prefix_query_tokens=prefix.num_query_tokens,
            num_prefix_hit_tokens=prefix.num_hit_tokens,
        )

    def check_integrity(self) -> None:
        """Recomputes the books from scratch; AssertionError names what is wrong."""
        self._book.check_integrity()
        in_flight = Counter(request for step in self._in_flight for request in step.requests)
        for request in {*self._book.live.values(), *in_flight}:
            assert request.num_in_flight == in_flight[request], request
        for request in self._book.live.values():
            coming = sum(
                samples
                for step in self._in_flight
                for other, samples in zip(step.requests, step.batch.samples, strict=True)
                if other is request
            )
            if not request.num_stale_steps:
                assert request.num_tokens == len(request.token_ids) + coming, request
            assert len(request.token_ids) < request.max_total_tokens, request
