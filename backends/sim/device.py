"""The simulated device: the reference behind a deferred queue."""

from __future__ import annotations

from quire.backends.reference import TorchDevice
from quire.backends.sim import INFO
from quire.backends.sim.queue import DeferredQueue
from quire.core.interface import Capabilities, Queue

_DTYPES = ("float32", "bfloat16", "float16")


class SimDevice(TorchDevice):
    """Host memory behind an asynchronous queue."""

    option_names = ()

    def __init__(self) -> None:
        super().__init__(
            info=INFO,
            torch_device="cpu",
            capabilities=Capabilities(
                dtypes=_DTYPES,
                cache_dtypes=_DTYPES,
                block_sizes=(16, 4, 8, 32),
                attention_kinds=frozenset({"causal", "sliding_window", "chunked", "mla"}),
                features=frozenset(
                    {"lora", "moe", "recurrent", "speculation", "state_slots", "cache_rows"}
                ),
                attention_features=frozenset({"soft_cap", "sinks", "alibi"}),
                is_asynchronous=True,
                copy_mode="asynchronous",
            ),
        )
        self._queue = DeferredQueue()

    def queue(self) -> Queue:
        return self._queue

    def synchronize(self) -> None:
        self._queue.backlog.drain()

    def close(self) -> None:
        self._queue.backlog.drain()
