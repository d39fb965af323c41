"""Small arrays go to the device and come back in one piece."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from worker_driver import make_device  # noqa: E402

from quire.backends.sim.device import SimDevice  # noqa: E402
from quire.core.interface import DeviceError, Queue  # noqa: E402
from quire.core.worker.staging import Field, StagingBuffer  # noqa: E402

ARRAYS = {
    "ids": np.arange(5, dtype=np.int64),
    "table": np.arange(6, dtype=np.int32).reshape(2, 3),
    "nothing": np.empty((0, 4), np.float32),
    "flags": np.array([True, False, True]),
    "numbers": np.linspace(0, 1, 7, dtype=np.float32),
}


class CountingQueue(Queue):
    """Copies at once, and counts."""

    def __init__(self):
        self.num_copies = 0

    def upload(self, staging, target):
        self.num_copies += 1
        target.copy_(staging)

    def run(self, work):
        work()

    def download(self, source, staging):
        self.num_copies += 1
        staging.copy_(source)

    def record(self):
        raise NotImplementedError


def device_with(queue, **claims):
    device = make_device(**claims)
    device.queue = lambda: queue
    return device


def check_equal(tensors):
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert str(tensors[name].dtype).removeprefix("torch.") == array.dtype.name


@pytest.mark.parametrize(("mode", "copies"), [("unified", 0), ("synchronous", 1)])
def test_upload_many_arrays_is_one_copy_or_none(mode, copies):
    """A step costs one transfer, however many arrays it has; shared memory costs none."""
    queue = CountingQueue()
    buffer = StagingBuffer(device_with(queue, copy_mode=mode))
    check_equal(buffer.upload(ARRAYS))
    assert queue.num_copies == copies


def test_upload_other_shapes_reuses_and_outgrows_the_buffer():
    """Shapes come and go; what was remembered of a smaller buffer is not used again."""
    buffer = StagingBuffer(make_device(copy_mode="synchronous"))
    check_equal(buffer.upload(ARRAYS))
    large = np.arange(5000, dtype=np.int64)
    assert buffer.upload({"large": large})["large"].tolist() == large.tolist()
    other = {**ARRAYS, "ids": np.arange(5, dtype=np.int64) + 70}
    assert buffer.upload(other)["ids"].tolist() == [70, 71, 72, 73, 74]
    check_equal(buffer.upload(ARRAYS))
    first = buffer.upload(ARRAYS)["ids"].data_ptr()
    assert buffer.upload(ARRAYS)["ids"].data_ptr() == first


@pytest.mark.parametrize("mode", ["unified", "synchronous"])
def test_download_brings_back_what_the_device_wrote(mode):
    """Results come back in one transfer, with their dtypes."""
    fields = [Field("a", (3,), "int64"), Field("b", (2, 2), "float32"), Field("c", (2,), "bool")]
    queue = CountingQueue()
    buffer = StagingBuffer(device_with(queue, copy_mode=mode))
    out = buffer.outputs(fields)
    out["a"].copy_(torch.tensor([1, 2, 3]))
    out["b"].fill_(0.5)
    out["c"].copy_(torch.tensor([True, False]))
    back = buffer.download(fields)
    assert back["a"].tolist() == [1, 2, 3]
    assert back["b"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert back["c"].tolist() == [True, False]
    assert queue.num_copies == (mode == "synchronous")


def test_upload_into_a_buffer_in_use_is_an_error_on_the_simulated_device():
    """The rule that two buffers exist for: this is what breaks with one."""
    device = SimDevice()
    buffer = StagingBuffer(device)
    buffer.upload({"x": np.array([1], np.int64)})
    buffer.upload({"x": np.array([2], np.int64)})
    with pytest.raises(DeviceError, match="written again before its upload was done"):
        device.queue().record().wait()
