"""Where each request is, and its way from one state to the next."""

from __future__ import annotations

import bisect

from quire.core.kv_cache.manager import KVCacheManager
from quire.core.scheduler.request import FinishReason, Request, RequestStatus, RequestUpdate
from quire.core.scheduler.waiting_queue import WaitingQueue


class RequestBook:
    """The requests that live, and what is owed after those that left.

    That is a word to the worker, and the release of blocks that steps in flight still write to.

        waiting -> running -> finished
            ^         |
            +- preempted
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self._cache = cache
        self.live: dict[str, Request] = {}
        self.running: list[Request] = []
        """In the order of the policy."""
        self.waiting = WaitingQueue()
        self._to_forget: list[str] = []
        self._unreleased: set[Request] = set()

    @property
    def is_awaiting_blocks(self) -> bool:
        """Whether steps in flight hold blocks of requests that left."""
        return bool(self._unreleased)

    def enter(self, request: Request) -> None:
        """A new request waits."""
        self.live[request.request_id] = request
        self.waiting.push(request)

    def start(self, request: Request, num_computed_tokens: int) -> None:
        """The request at the head of the queue runs; the worker gets to know it."""
        taken = self.waiting.pop()
        assert taken is request, f"{request.request_id} is not at the head of the queue"
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_computed_tokens
        request.is_known_to_worker = True
        bisect.insort(self.running, request, key=_order_key)

    def preempt(self, request: Request) -> None:
        """A running request gives its blocks back and waits again, to be computed anew."""
        self.running.remove(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.push(request)
        self._leave_worker(request)

    def finish(
        self,
        request: Request,
        reason: FinishReason,
        *,
        new_token_ids: list[int] | None = None,
        stop_reason: int | None = None,
        error: str | None = None,
    ) -> RequestUpdate:
        """The request's end, from any state."""
        del self.live[request.request_id]
        was_running = request.status is RequestStatus.RUNNING
        request.status = RequestStatus.FINISHED
        if was_running:
            self.running.remove(request)
        else:
            self.waiting.note_finished()
        self._leave_worker(request)
        return RequestUpdate(
            request.request_id,
            new_token_ids or [],
            reason,
            stop_reason,
            request.num_cached_tokens,
            request.num_preemptions,
            request.first_scheduled_time_s,
            error=error,
        )

    def _leave_worker(self, request: Request) -> None:
        if request.is_known_to_worker:
            request.is_known_to_worker = False
            self._to_forget.append(request.request_id)
        if request.num_in_flight:
            self._unreleased.add(request)
        else:
            self._cache.free(request.table)

    def settle(self, request: Request) -> None:
        """After a step of a request that left came back: the last one releases its blocks."""
        if request.num_in_flight == 0:
            self._unreleased.discard(request)
            self._cache.free(request.table)

    def take_ids_to_forget(self) -> list[str]:
        """The ids that the worker has not been told to forget; each is handed out once."""
        ids, self._to_forget = self._to_forget, []
        return ids

    def forget_again(self, request_ids: list[str]) -> None:
        """Takes back ids that were handed out with a step that did not happen."""
        self._to_forget = list(dict.fromkeys(request_ids + self._to_forget))

    def check_integrity(self) -> None:
        """Compares the states of the requests with the places where they are.

        Raises: AssertionError that names what is wrong.
        """
        waiting = self.waiting.requests()
        assert len(waiting) == len(self.waiting), (
            f"{len(waiting)} wait, counted {len(self.waiting)}"
        )
        places = [request.request_id for request in (*waiting, *self.running)]
        assert sorted(places) == sorted(self.live), f"placed {places}, live {list(self.live)}"
        keys = [request.order_key for request in self.running]
        assert keys == sorted(keys), f"running is out of order: {keys}"
        assert len(set(self._to_forget)) == len(self._to_forget), self._to_forget
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, request
            assert request.is_known_to_worker, request
        for request in waiting:
            assert request.status in {RequestStatus.WAITING, RequestStatus.PREEMPTED}, request
            assert not request.is_known_to_worker, request
            assert request.num_computed_tokens == 0, request
        for request in self._unreleased:
            assert request.num_in_flight > 0, request
            assert request.status is not RequestStatus.RUNNING, request
        holders = {request.table for request in (*self.running, *self._unreleased)}
        self._cache.check_integrity(holders)


def _order_key(request: Request) -> tuple[int, ...]:
    return request.order_key
