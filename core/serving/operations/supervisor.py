"""Watches the engine and does what the operator wants when it dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable

from quire.core.engine.async_engine import AsyncEngine
from quire.core.errors import QuireError
from quire.core.serving.server_state import ServerState

logger = logging.getLogger(__name__)

_POLL_S = 0.1
"""The engine offers a property; who waits for an answer is told by the engine itself, at once."""
_WINDOW_S = 600.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0


class Supervisor:
    """Restarts a dead engine as often as the settings allow. Runs until it gives up."""

    def __init__(
        self, state: ServerState, start_engine: Callable[[], Awaitable[AsyncEngine]]
    ) -> None:
        self._state = state
        self._start_engine = start_engine
        self._deaths_s: deque[float] = deque()

    async def run(self) -> None:
        """Returns when the server should end because of its engine; with `stay` it never does."""
        while True:
            await self._wait_death()
            policy = self._state.settings.on_engine_death
            logger.error("the engine died; %s: %s", policy, self._state.engine.dead_error)
            if policy == "stay":
                await asyncio.Event().wait()
            if policy == "exit" or not await self._restart():
                return

    async def _wait_death(self) -> None:
        while not self._state.engine.errored:  # noqa: ASYNC110 - see _POLL_S
            await asyncio.sleep(_POLL_S)

    async def _restart(self) -> bool:
        """Starts engines until one lives; False if there were too many attempts."""
        state = self._state
        state.is_restarting = True
        state.gate.pause()
        try:
            await state.engine.shutdown()
            while self._may_try():
                await asyncio.sleep(self._pause_s())
                if await self._try_start():
                    state.gate.resume()
                    return True
        finally:
            state.is_restarting = False
        logger.error("the engine died %d times; giving up", len(self._deaths_s))
        return False

    async def _try_start(self) -> bool:
        try:
            engine = await self._start_engine()
        except QuireError as error:
            logger.warning("the engine did not start again: %s", error)
            return False
        self._state.replace_engine(engine)
        logger.warning("the engine is back after restart %d", self._state.num_restarts)
        return True

    def _may_try(self) -> bool:
        """Takes note of a death; whether another start is allowed."""
        now_s = time.monotonic()
        while self._deaths_s and now_s - self._deaths_s[0] > _WINDOW_S:
            self._deaths_s.popleft()
        self._deaths_s.append(now_s)
        return len(self._deaths_s) <= self._state.settings.max_engine_restarts

    def _pause_s(self) -> float:
        """Doubles with each death, so that a broken device is not hammered."""
        return min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (len(self._deaths_s) - 1))
