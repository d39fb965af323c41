"""The responses that a server remembers, so that a conversation goes on by an id."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.protocol.responses import ResponseObject

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 2**20
"""What a server keeps of its clients' conversations; the oldest are forgotten first."""


@dataclass(slots=True, kw_only=True)
class StoredResponse:
    """One response, finished or on its way."""

    response: ResponseObject
    owner: str | None
    """The name of the key with which it was asked; only that key sees it."""
    items: Sequence[dict[str, Any]]
    """The input of its turn."""
    messages: Sequence[dict[str, Any]]
    """The conversation before the answer, without instructions."""
    task: asyncio.Task[None] | None = None
    """What answers it, in the background."""

    @property
    def is_running(self) -> bool:
        """Whether it changes yet."""
        return self.task is not None and not self.task.done()


@dataclass(slots=True)
class ResponseStore:
    """Bounded by number and by size; what still runs is never forgotten."""

    max_responses: int = MAX_RESPONSES
    max_bytes: int = MAX_BYTES
    _entries: dict[str, StoredResponse] = field(default_factory=dict)
    _sizes: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_running(self) -> int:
        """Responses that are answered in the background."""
        return sum(entry.is_running for entry in self._entries.values())

    def put(self, entry: StoredResponse) -> None:
        """Remembers a response, or what became of one that is there; forgets the oldest."""
        key = entry.response.id
        self._entries[key] = entry
        self._sizes[key] = _size_of(entry)
        total = sum(self._sizes.values())
        for old in [k for k, e in self._entries.items() if k != key and not e.is_running]:
            if len(self._entries) <= self.max_responses and total <= self.max_bytes:
                return
            total -= self._sizes.pop(old)
            del self._entries[old]

    def get(self, response_id: str, owner: str | None) -> StoredResponse:
        """The response of that id. Raises: HttpError (404) if it is not there, or another's."""
        entry = self._entries.get(response_id)
        if entry is None or entry.owner != owner:
            raise HttpError(
                Failure(
                    status=404,
                    message=f"there is no response {response_id[:80]!r}; it was not stored, or it "
                    "is forgotten",
                    type="not_found_error",
                    param="response_id",
                    code="response_not_found",
                )
            )
        return entry

    def forget(self, response_id: str) -> None:
        """Forgets a response that is there."""
        del self._entries[response_id], self._sizes[response_id]

    def check_room(self) -> None:
        """Raises: HttpError (429) if as many run in the background as are remembered."""
        if self.num_running >= self.max_responses:
            raise HttpError(
                Failure(
                    status=429,
                    message=f"{self.num_running} responses run in the background; try again later",
                    type="rate_limit_error",
                    code="queue_full",
                    headers={"Retry-After": "1"},
                )
            )


async def stop(entry: StoredResponse) -> None:
    """Ends what answers it and waits until it has ended."""
    if entry.task is not None:
        entry.task.cancel()
        await asyncio.gather(entry.task, return_exceptions=True)


def _size_of(entry: StoredResponse) -> int:
    return len(entry.response.to_json()) + len(repr(entry.items)) + len(repr(entry.messages))
