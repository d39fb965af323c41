"""Requests that wait, in the order of the policy."""

from __future__ import annotations

import heapq

from quire.core.scheduler.request import Request, RequestStatus

_COMPACT_ABOVE = 64


class WaitingQueue:
    """A heap by `order_key`. A preempted request keeps its key and so comes back to the front.

    A request that ends while it waits stays in the heap, unseen, until it comes up or too many such
    have gathered.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, ...], int, Request]] = []
        self._num_gone = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_gone

    def push(self, request: Request) -> None:
        """Lets a request wait."""
        heapq.heappush(self._heap, (request.order_key, request.arrival_index, request))

    def peek(self) -> Request | None:
        """The request whose turn is next."""
        heap = self._heap
        while heap and heap[0][2].status is RequestStatus.FINISHED:
            heapq.heappop(heap)
            self._num_gone -= 1
        return heap[0][2] if heap else None

    def pop(self) -> Request:
        """Takes the request that `peek` showed."""
        return heapq.heappop(self._heap)[2]

    def note_finished(self) -> None:
        """To be told when a request that waits has got status FINISHED."""
        self._num_gone += 1
        if self._num_gone > _COMPACT_ABOVE and self._num_gone * 2 > len(self._heap):
            self._heap = [
                entry for entry in self._heap if entry[2].status is not RequestStatus.FINISHED
            ]
            heapq.heapify(self._heap)
            self._num_gone = 0

    def requests(self) -> list[Request]:
        """All that wait, in no order."""
        return [
            request for _, _, request in self._heap if request.status is not RequestStatus.FINISHED
        ]
