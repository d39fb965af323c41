"""Whether requests are let in, and how many are inside."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from quire.core.serving.http.error_responses import SERVER, Failure, HttpError


class Gate:
    """Counts the requests for tokens that are being answered; closed or paused, lets no more in."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._is_open = True
        self._is_paused = False
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def is_open(self) -> bool:
        """Whether new requests are let in."""
        return self._is_open and not self._is_paused

    @property
    def num_inside(self) -> int:
        """Requests that are being answered."""
        return self._num_inside

    def close(self) -> None:
        """Lets no more in; those inside go on."""
        self._is_open = False

    def pause(self) -> None:
        """Lets nobody in until `resume`: the engine is being started again."""
        self._is_paused = True

    def resume(self) -> None:
        """Lets requests in again, unless the gate was closed."""
        self._is_paused = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside for the time of the block. Raises: HttpError (503) when closed or paused."""
        if not self._is_open:
            raise HttpError(
                Failure(
                    status=503,
                    message="the server is shutting down; send the request to another one",
                    type=SERVER,
                    code="shutting_down",
                    headers={"Retry-After": "5", "Connection": "close"},
                )
            )
        if self._is_paused:
            raise HttpError(
                Failure(
                    status=503,
                    message="the engine died and is being started again; try again soon",
                    type=SERVER,
                    code="engine_restarting",
                    headers={"Retry-After": "5"},
                )
            )
        self._num_inside += 1
        self._is_empty.clear()
        try:
            yield
        finally:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._is_empty.set()

    async def wait_empty(self, timeout_s: float) -> bool:
        """Waits until nobody is inside; False if that took longer than `timeout_s`."""
        try:
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
