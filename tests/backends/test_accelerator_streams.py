"""Queue, graphs and errors of accelerators over a stand-in for torch's stream API on the CPU."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from quire.backends.cuda.backend import CUDA
from quire.backends.torch_accelerator import device as accelerator
from quire.backends.torch_accelerator.errors import device_errors
from quire.backends.torch_accelerator.graphs import ReplayedCalls, TorchGraphs
from quire.backends.torch_accelerator.queue import StreamQueue
from quire.core.interface import (
    DeviceError,
    DeviceInfo,
    DeviceLost,
    DeviceOutOfMemory,
    UnsupportedError,
)


class Event:
    def __init__(self, module):
        self.module, self.at = module, None

    def record(self, stream):
        self.at = len(self.module.log)
        self.module.log.append("record")

    def query(self):
        self.module.fail()
        return self.module.done >= self.at

    def synchronize(self):
        self.module.fail()
        self.module.done = max(self.module.done, self.at)


class Stream:
    def __init__(self, module):
        self.module = module

    def wait_stream(self, other):
        self.module.log.append("wait")

    def synchronize(self):
        self.module.log.append("synchronize")


class Graph:
    """Records what runs between begin and end; a replay only counts."""

    def __init__(self, module):
        self.module, self.pools = module, []

    def capture_begin(self, pool=None):
        self.module.fail()
        self.pools.append(pool)
        self.module.log.append("begin")

    def capture_end(self):
        self.module.log.append("end")

    def replay(self):
        self.module.fail()
        self.module.log.append("replay")

    def reset(self):
        self.module.log.append("reset")

    def pool(self):
        return "the pool"


class StandIn:
    """What `torch.get_device_module` gives, as far as the backends use it."""

    def __init__(self, *, has_graphs=True):
        self.log, self.done, self.error, self.made = [], -1, None, []
        if has_graphs:
            self.CUDAGraph = self._graph

    def fail(self):
        if self.error is not None:
            raise self.error

    def _graph(self):
        self.made.append(Graph(self))
        return self.made[-1]

    def Event(self):
        return Event(self)

    def Stream(self, device):
        return Stream(self)

    def current_stream(self, device=None):
        return Stream(self)

    @contextmanager
    def stream(self, stream):
        self.log.append("enter")
        yield
        self.log.append("leave")

    @contextmanager
    def device(self, device):
        self.log.append(f"on {device}")
        yield

    def set_device(self, device):
        self.fail()


@pytest.fixture
def module(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(torch, "get_device_module", lambda device: stand_in)
    return stand_in


ADVICE = "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
"""torch ends every error of CUDA with it."""


def lost():
    return torch.AcceleratorError("an illegal memory access was encountered\nmore")


def test_queue_copies_and_runs_in_order_and_its_event_waits_for_what_was_before(module):
    """Upload, work and download keep their order; an event is done when its point is reached."""
    queue = StreamQueue("cpu")
    source, target, back = torch.arange(3.0), torch.zeros(3), torch.zeros(3)
    queue.upload(source, target)
    queue.run(lambda: target.mul_(2))
    queue.download(target, back)
    event = queue.record()
    assert back.tolist() == [0, 2, 4]
    assert module.log == ["on cpu", "record"]
    assert not event.is_done()
    event.wait()
    assert event.is_done()


@pytest.mark.parametrize("ask", ["is_done", "wait"])
def test_device_lost_in_mid_step_is_told_where_the_step_is_awaited(module, ask):
    """Asynchronous failures surface at the event, with one line and the remedy."""
    event = StreamQueue("cpu").record()
    module.error = lost()
    with pytest.raises(
        DeviceLost, match=r"step.*illegal memory access was encountered; restart the engine"
    ):
        getattr(event, ask)()


def test_capture_warms_up_on_a_stream_of_its_own_and_graphs_share_a_pool(module):
    """Two calls before the recording, then replays that call nothing; release gives all back."""
    calls, graphs = [], TorchGraphs("cpu")
    first = graphs.capture("decode of 1", lambda: calls.append(1))
    assert calls == [1, 1, 1]
    assert module.log.index("synchronize") < module.log.index("begin") < module.log.index("end")
    graphs.capture("decode of 2", lambda: None)
    assert [graph.pools for graph in module.made] == [[None], ["the pool"]]
    first.replay()
    assert calls == [1, 1, 1]
    assert module.log[-1] == "replay"
    graphs.release()
    assert module.log[-2:] == ["reset", "reset"]


def test_memory_refused_at_capture_is_typed_and_the_recording_is_ended(module):
    """Out of memory inside a recording closes it, or the stream could never be used again."""
    steps = iter([None, None, torch.OutOfMemoryError("HIP out of memory. Tried 2 GiB")])

    def step():
        error = next(steps)
        if error is not None:
            raise error

    with pytest.raises(DeviceOutOfMemory, match="graphs: HIP out of memory") as caught:
        TorchGraphs("cpu").capture("decode of 64", step)
    assert caught.value.tag == "graphs"
    assert module.log[module.log.index("begin") + 1] == "end"


@pytest.mark.parametrize("error", [RuntimeError, torch.AcceleratorError])
def test_step_that_cannot_be_recorded_is_refused_with_its_reason(module, error):
    """An operation that a recording forbids is no lost device: the step runs eagerly."""

    def step():
        if "begin" in module.log:
            raise error("operation not permitted when stream is capturing" + ADVICE)

    with pytest.raises(UnsupportedError, match="not permitted when stream is capturing"):
        TorchGraphs("cpu").capture("decode of 1", step)


def test_recording_that_cannot_even_be_ended_tells_why_it_failed(module, monkeypatch):
    """torch asks the driver to end a recording that is broken; its answer hides no cause."""

    def capture_end(graph):
        raise torch.AcceleratorError("operation failed due to a previous error during capture")

    def step():
        if "begin" in module.log:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Graph, "capture_end", capture_end)
    with pytest.raises(DeviceOutOfMemory, match="graphs: CUDA out of memory"):
        TorchGraphs("cpu").capture("decode of 64", step)


def test_torch_without_graphs_is_refused(monkeypatch):
    """A build that cannot record says so when asked, not at import."""
    monkeypatch.setattr(torch, "get_device_module", lambda device: StandIn(has_graphs=False))
    with pytest.raises(UnsupportedError, match="has no graphs"):
        TorchGraphs("cpu").capture("decode", lambda: None)


def test_lost_device_at_replay_is_told(module):
    """A replay is where a broken graph first shows."""
    step = TorchGraphs("cpu").capture("decode", lambda: None)
    module.error = lost()
    with pytest.raises(DeviceLost, match="replay"):
        step.replay()


def test_arrays_of_a_replay_are_copied_by_what_the_vendor_offers(module):
    """It is opened once and before the first recording: modules are not loaded while one is made."""
    opened, copied = [], []

    def open_copies():
        opened.append(len(module.log))
        return copied.extend

    graphs = TorchGraphs("cpu", open_copies)
    graphs.capture("decode of 1", lambda: None)
    graphs.capture("decode of 2", lambda: None)
    pair = (torch.arange(3), torch.zeros(3))
    graphs.fill([pair])
    assert opened == [0]
    assert copied == [pair]


@pytest.mark.parametrize("cause", ["NVRTC was not found", "copied wrong bytes"])
def test_arrays_are_copied_one_by_one_where_nothing_better_can_be_had(module, caplog, cause):
    """The step is served the way that always works, and the log says why."""

    def open_copies():
        raise RuntimeError(cause)

    graphs = TorchGraphs("cpu", open_copies)
    graphs.capture("decode of 1", lambda: None)
    graphs.capture("decode of 2", lambda: None)
    target = torch.zeros(2, 4, dtype=torch.int64)
    graphs.fill([(torch.ones(2, 3, dtype=torch.int32), target[:, :3])])
    assert target.tolist() == [[1, 1, 1, 0]] * 2
    said = [record.message for record in caplog.records]
    assert said == [f"the arrays of replayed steps are copied one by one: {cause}"]


def test_device_lost_while_the_copies_are_opened_is_no_reason_to_go_without(module):
    """What the driver says of work before is not the copies' fault."""

    def open_copies():
        raise RuntimeError("CUDA error: an illegal memory access was encountered (cuLaunch: 700)")

    with pytest.raises(DeviceLost, match="restart the engine"):
        TorchGraphs("cpu", open_copies).capture("decode of 1", lambda: None)


def test_device_lost_before_the_copies_of_a_replay_is_told(module):
    """The copies are the first of a step to ask the device."""

    def copies(pairs):
        raise RuntimeError("CUDA error: unspecified launch failure (cuLaunchKernel: 719)")

    graphs = TorchGraphs("cpu", lambda: copies)
    graphs.capture("decode of 1", lambda: None)
    with pytest.raises(DeviceLost, match=r"replay.*unspecified launch failure"):
        graphs.fill([])


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), DeviceLost),
        (RuntimeError("Triton Error [HIP]:  Code: 719, unspecified launch failure"), DeviceLost),
        (
            RuntimeError("level_zero backend failed with 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
            DeviceLost,
        ),
        (lost(), DeviceLost),
        (torch.AcceleratorError("CUDA error: unknown error" + ADVICE), DeviceLost),
        (torch.AcceleratorError("CUDA error: invalid argument" + ADVICE), DeviceError),
        (torch.AcceleratorError("HIP error: invalid device function" + ADVICE), DeviceError),
        (RuntimeError("Triton Error [CUDA]: no kernel image is available"), DeviceError),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), RuntimeError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling x"), torch.OutOfMemoryError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (DeviceOutOfMemory("no memory", tag="cache"), DeviceOutOfMemory),
    ],
)
def test_work_that_finds_its_device_lost_says_so_whoever_launched_it(module, error, kind):
    """Triton launches by the driver itself and raises an ordinary error; memory stays the core's."""

    def work():
        raise error

    with pytest.raises(kind) as caught:
        StreamQueue("cpu").run(work)
    assert type(caught.value) is kind


def test_replayed_call_calls_again():
    """The interpreter's stand-in for a graph runs the same step."""
    calls = []
    ReplayedCalls().capture("decode", lambda: calls.append(1)).replay()
    assert calls == [1]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), DeviceOutOfMemory),
        (RuntimeError("UR_RESULT_ERROR: out of memory"), DeviceOutOfMemory),
        (RuntimeError("failed with 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), DeviceOutOfMemory),
        (lost(), DeviceLost),
        (RuntimeError("shapes do not fit"), RuntimeError),
    ],
)
def test_errors_of_torch_become_typed_ones(error, kind):
    """Memory and loss are told apart; a mistake of ours stays what it is."""
    with pytest.raises(kind) as caught, device_errors("cache"):
        raise error
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "kind", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemory, "end the processes"),
        (lost(), DeviceLost, "reset the device"),
        (RuntimeError("no driver"), DeviceError, "update NVIDIA's driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), DeviceError, "driver"),
        (
            torch.AcceleratorError("CUDA error: driver version is insufficient" + ADVICE),
            DeviceError,
            "update NVIDIA's driver",
        ),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available" + ADVICE),
            DeviceError,
            "a build of torch that is made for this device",
        ),
    ],
)
def test_device_that_refuses_to_open_is_a_typed_error(monkeypatch, error, kind, remedy):
    """No memory for a context, a dead device, a driver that refuses: each by its name."""
    real = torch.zeros

    def zeros(*shape, **named):
        if str(named.get("device", "")).startswith("cuda"):
            raise error
        return real(*shape, **named)

    monkeypatch.setattr(torch, "zeros", zeros)
    info = DeviceInfo(index=0, name="H200", architecture="sm_90")
    with pytest.raises(kind, match=remedy) as caught:
        accelerator.open_device(CUDA, info, num_devices=1, is_interpreted=False)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
