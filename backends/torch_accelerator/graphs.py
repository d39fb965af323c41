"""Recording a step into a graph of the device's, and replaying it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from quire.backends.torch_accelerator.errors import device_errors
from quire.backends.torch_accelerator.vendor import Copies
from quire.core.interface import (
    CapturedStep,
    DeviceError,
    DeviceLost,
    DeviceOutOfMemory,
    GraphCapture,
    Reason,
    UnsupportedError,
)

_WARM_UPS = 2
"""The first call compiles kernels and makes handles, the second finds them made."""
_GRAPH_CLASSES = ("CUDAGraph", "XPUGraph")
_LOGGER = logging.getLogger(__name__)


def offers_graphs(module: Any) -> bool:
    """Whether torch's module of a device can record: for some devices newer versions alone do."""
    return any(hasattr(module, name) for name in _GRAPH_CLASSES)


class TorchGraphs(GraphCapture):
    """Graphs of one device; they share one pool of memory, since they never run at once."""

    def __init__(self, torch_device: str, open_copies: Callable[[], Copies] | None = None) -> None:
        """`open_copies` gives what copies a step's arrays by one launch, or raises RuntimeError."""
        self._device = torch_device
        self._open_copies = open_copies
        self._copies: Copies = super().fill
        self._module: Any = torch.get_device_module(torch_device)
        self._pool: Any = None
        self._captured: list[Any] = []

    def capture(self, key: str, step: Callable[[], None]) -> CapturedStep:
        self._find_copies()
        graph = self._new_graph(key)
        stream = self._module.Stream(self._device)
        try:
            with device_errors("graphs"):
                stream.wait_stream(self._module.current_stream())
                with self._module.stream(stream):
                    for _ in range(_WARM_UPS):
                        step()
                    stream.synchronize()
                    _record(graph, self._pool, step)
                self._module.current_stream().wait_stream(stream)
        except (DeviceLost, DeviceOutOfMemory):
            raise
        except (DeviceError, RuntimeError) as error:
            raise _refusal(key, str(error.__cause__ or error)) from error
        self._pool = graph.pool()
        self._captured.append(graph)
        return _TorchGraph(graph)

    def fill(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        with device_errors("replay"):
            self._copies(pairs)

    def release(self) -> None:
        for graph in self._captured:
            graph.reset()
        self._captured.clear()
        self._pool = None

    def _find_copies(self) -> None:
        """Before the first recording: modules are not loaded while one is made."""
        open_copies, self._open_copies = self._open_copies, None
        if open_copies is None:
            return
        try:
            with device_errors("graphs"):
                self._copies = open_copies()
        except (DeviceLost, DeviceOutOfMemory):
            raise
        except (DeviceError, RuntimeError) as error:
            _LOGGER.warning("the arrays of replayed steps are copied one by one: %s", error)

    def _new_graph(self, key: str) -> Any:
        for name in _GRAPH_CLASSES:
            graph_class = getattr(self._module, name, None)
            if graph_class is not None:
                return graph_class()
        raise _refusal(key, f"torch {torch.__version__} has no graphs for {self._device}")


def _record(graph: Any, pool: Any, step: Callable[[], None]) -> None:
    """Records a step, and ends the recording also where the step fails.

    Ending one that has failed fails too; what is told is why.
    """
    graph.capture_begin(pool=pool)
    try:
        step()
    except BaseException:
        with suppress(RuntimeError):
            graph.capture_end()
        raise
    graph.capture_end()


class _TorchGraph(CapturedStep):
    def __init__(self, graph: Any) -> None:
        self._graph = graph

    def replay(self) -> None:
        with device_errors("replay"):
            self._graph.replay()


class ReplayedCalls(GraphCapture):
    """Where nothing can be recorded, as in the interpreter: a replay calls the step again.

    What the step learnt from the host while it was recorded is what it uses at every replay, as in
    a graph, so a plan that takes lengths from the host gives wrong results here too.
    """

    def capture(self, key: str, step: Callable[[], None]) -> CapturedStep:
        return _Call(step)


class _Call(CapturedStep):
    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def replay(self) -> None:
        self._step()


def _refusal(key: str, why: str) -> UnsupportedError:
    reason = Reason(
        code="graphs.capture",
        need=f"a recording of {key}",
        have=why.partition("\n")[0],
        remedy="nothing need be done: such steps run eagerly",
    )
    return UnsupportedError([reason], what="recording a step")
