"""How much a key may use: requests and tokens a minute, and requests at once.

The library `limits` refuses what exceeds a window and then forgets it; what an answer costs is
known only at its end, so that a budget must be able to fall into debt. Hence a bucket of our own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from quire.core.serving.http.error_responses import Failure, HttpError
from quire.core.serving.operations.api_keys import ApiKey

_MINUTE_S = 60.0


class Budget:
    """A bucket that fills by `per_minute` and holds one minute's worth. May fall into debt."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        self._rate = per_minute / _MINUTE_S
        # A rate below one a minute must still let one through.
        self._capacity = max(per_minute, 1.0)
        self._level = self._capacity
        self._as_of_s = now_s

    def wait_s(self, cost: float, now_s: float) -> float:
        """Seconds until `cost` is there; 0: it is."""
        self._fill(now_s)
        return max(0.0, (min(cost, self._capacity) - self._level) / self._rate)

    def spend(self, cost: float, now_s: float) -> None:
        """Takes `cost`, whether it is there or not."""
        self._fill(now_s)
        self._level -= cost

    def _fill(self, now_s: float) -> None:
        elapsed_s = max(0.0, now_s - self._as_of_s)
        self._level = min(self._capacity, self._level + elapsed_s * self._rate)
        self._as_of_s = now_s


@dataclass(slots=True)
class _Account:
    """What one key has used."""

    requests: Budget | None
    tokens: Budget | None
    num_inside: int = 0


class KeyLimits:
    """The accounts of all keys. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    @contextmanager
    def admitted(self, key: ApiKey) -> Iterator[None]:
        """Inside for the time of the block. Raises: HttpError (429) with what is used up."""
        account = self._account(key)
        self._refuse_if_spent(key, account)
        if account.requests is not None:
            account.requests.spend(1.0, self._clock())
        account.num_inside += 1
        try:
            yield
        finally:
            account.num_inside -= 1

    def spend_tokens(self, key: ApiKey, number: int) -> None:
        """Takes note of what a request has used, when it is over."""
        tokens = self._account(key).tokens
        if tokens is not None:
            tokens.spend(float(number), self._clock())

    def _refuse_if_spent(self, key: ApiKey, account: _Account) -> None:
        now_s = self._clock()
        if key.max_concurrency is not None and account.num_inside >= key.max_concurrency:
            raise _too_many(f"{key.max_concurrency} requests at once", 1.0)
        if account.requests is not None and (wait_s := account.requests.wait_s(1.0, now_s)) > 0:
            raise _too_many(f"{key.requests_per_minute:g} requests a minute", wait_s)
        if account.tokens is not None and (wait_s := account.tokens.wait_s(1.0, now_s)) > 0:
            raise _too_many(f"{key.tokens_per_minute:g} tokens a minute", wait_s)

    def _account(self, key: ApiKey) -> _Account:
        found = self._accounts.get(key.name)
        if found is None:
            now_s = self._clock()
            found = self._accounts[key.name] = _Account(
                requests=_budget(key.requests_per_minute, now_s),
                tokens=_budget(key.tokens_per_minute, now_s),
            )
        return found


def _budget(per_minute: float | None, now_s: float) -> Budget | None:
    return None if per_minute is None else Budget(per_minute, now_s)


def _too_many(what: str, wait_s: float) -> HttpError:
    return HttpError(
        Failure(
            status=429,
            message=f"this API key may use {what}, which are used up; see Retry-After",
            type="rate_limit_error",
            code="rate_limit_exceeded",
            headers={"Retry-After": str(max(1, int(wait_s + 0.999)))},
        )
    )
