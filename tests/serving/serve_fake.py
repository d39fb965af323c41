"""A program: the real server, life cycle and all, around a fake engine.

python serve_fake.py PORT SHUTDOWN_TIMEOUT_S [engine fields as JSON]
"""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fake_engine import FakeEngine

from quire.core.config import EngineConfig
from quire.core.errors import EngineDeadError
from quire.core.serving.lifecycle import Announcement, run_server
from quire.core.serving.settings import ServerSettings

say = functools.partial(print, flush=True)  # the parent reads lines


class ProgramEngine(FakeEngine):
    """Holds requests whose prompt begins with `hold`.

    A request that says `release`, or SIGUSR1 where none is let in any more, lets them go.
    """

    async def submit(self, prompt, params, request_id, **options):
        if prompt == "release":
            self.hold.set()
        if prompt == "die":
            self.dead_error = EngineDeadError("died on request")
        return await super().submit(prompt, params, request_id, **options)


async def start(config: EngineConfig) -> FakeEngine:
    if config.model == "never":
        say("loading")
        await asyncio.Event().wait()
    hold = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, hold.set)
    return ProgramEngine(hold=hold)


def announce(ready: Announcement) -> None:
    """Says the address, which must take connections by then: the parent connects at once."""
    _, _, address = ready.url.partition("://")
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port))).close()
    say(ready.url)


def main() -> int:
    port, timeout_s = int(sys.argv[1]), float(sys.argv[2])
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    config = EngineConfig(model=options.pop("model", "fake"))
    settings = ServerSettings(port=port, shutdown_timeout_s=timeout_s, **options)
    say("bound")
    return run_server(config, settings, announce=announce, start_engine=start)


if __name__ == "__main__":
    sys.exit(main())
