"""Memory that weights pass through is used again, and never while somebody reads it."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from quire.core.models.weights.staging import Staging  # noqa: E402

LARGE = (1024, 1024)


def test_memory_of_a_dropped_tensor_is_used_again():
    """Fresh memory for each layer would cost its page faults."""
    staging = Staging()
    first = staging.take(LARGE, torch.float32, "cpu")
    address = first.data_ptr()
    del first
    again = staging.take((300, 1024), torch.bfloat16, "cpu")
    assert again.shape == (300, 1024)
    assert again.data_ptr() != address, "too small for a mapping"
    assert staging.take((1024, 512), torch.bfloat16, "cpu").data_ptr() == address


@pytest.mark.parametrize("keep", [lambda t: t, lambda t: t[3:5], lambda t: t.view(torch.uint8)])
def test_memory_that_a_tensor_or_a_view_keeps_is_left_alone(keep):
    """A device may keep what it was given as its packed form."""
    staging = Staging()
    kept = keep(staging.take(LARGE, torch.float32, "cpu").fill_(1.0))
    before = kept.clone()
    staging.take(LARGE, torch.float32, "cpu").fill_(2.0)
    assert torch.equal(kept, before)


def test_larger_tensor_takes_new_memory():
    """The largest so far is kept for the next."""
    staging = Staging()
    small = staging.take(LARGE, torch.bfloat16, "cpu").fill_(3)
    large = staging.take((2048, 1024), torch.bfloat16, "cpu").fill_(4)
    assert small.eq(3).all()
    address = large.data_ptr()
    del large
    assert staging.take(LARGE, torch.bfloat16, "cpu").data_ptr() == address


def test_tensors_of_other_devices_are_left_to_them():
    """The host's memory is not theirs."""
    assert Staging().take(LARGE, torch.float32, "meta").device.type == "meta"
