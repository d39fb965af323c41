"""The simulated device catches what a real asynchronous device punishes rarely."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from quire.backends.sim.queue import DeferredQueue
from quire.core.interface import DeviceError


def _times_ten(x: torch.Tensor) -> None:
    x.mul_(10.0)


def test_result_read_before_its_event_is_poison() -> None:
    """A read before synchronisation must never look right by luck."""
    queue = DeferredQueue()
    device, staging = torch.ones(4), torch.zeros(4)
    queue.download(device, staging)
    event = queue.record()
    assert staging.isnan().all()
    assert not event.is_done()
    event.wait()
    assert event.is_done()
    assert torch.equal(staging, torch.ones(4))


def test_staging_buffer_written_too_early_is_an_error() -> None:
    """Reusing a staging buffer before its upload is done is the classic bug of overlap."""
    queue = DeferredQueue()
    staging, target = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    queue.upload(staging, target)
    staging.fill_(7)
    with pytest.raises(DeviceError, match="staging buffer was written again"):
        queue.backlog.drain()


def test_device_tensor_read_before_its_upload_is_poison() -> None:
    """Work that runs outside the queue sees poison, not last step's data."""
    queue = DeferredQueue()
    target = torch.zeros(3, dtype=torch.int32)
    queue.upload(torch.ones(3, dtype=torch.int32), target)
    assert (target == torch.iinfo(torch.int32).min).all()
    queue.backlog.drain()
    assert (target == 1).all()


def test_work_happens_in_order_and_only_when_awaited() -> None:
    """Copies and computation keep their order; an earlier event does not run later work."""
    queue = DeferredQueue()
    x, staging = torch.zeros(1), torch.zeros(1)
    queue.upload(torch.full((1,), 2.0), x)
    first = queue.record()
    queue.run(partial(_times_ten, x))
    queue.download(x, staging)
    second = queue.record()
    first.wait()
    assert x.item() == 2.0
    second.wait()
    assert staging.item() == 20.0


def test_work_that_fails_raises_where_it_is_awaited() -> None:
    """The error of a deferred step reaches whoever waits for it."""
    queue = DeferredQueue()

    def fail() -> None:
        raise DeviceError("kernel fault")

    queue.run(fail)
    event = queue.record()
    with pytest.raises(DeviceError, match="kernel fault"):
        event.wait()
