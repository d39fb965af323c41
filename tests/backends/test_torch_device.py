"""The device that vendors subclass: the reference for everything, on any torch device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quire.backends.reference import ReferenceAttention, ReferenceOps, TorchDevice
from quire.core.interface import AttentionSpec, DeviceInfo, DeviceOutOfMemory, UnsupportedError

SPEC = AttentionSpec(
    num_heads=2, num_kv_heads=1, head_size=4, v_head_size=4, scale=0.5,
    dtype="float32", cache_dtype="float32", block_size=16,
)  # fmt: skip


@pytest.fixture
def device() -> TorchDevice:
    return TorchDevice(info=DeviceInfo(index=0, name="somewhere"))


def test_device_without_overrides_is_complete(device):
    """An empty subclass serves: operators, attention, memory, and conservative claims."""
    assert isinstance(device.ops(), ReferenceOps)
    assert device.ops() is device.ops()
    attention = device.attention(SPEC)
    assert isinstance(attention, ReferenceAttention)
    assert attention.provider() == "reference"
    memory = device.memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert device.capabilities.determinism == "none"
    device.synchronize()
    device.close()


def test_device_of_a_subclass_uses_its_parts():
    """A vendor names its operators and its attention, and nothing else."""

    class Fast(ReferenceOps):
        def provider(self, op):
            return "fast"

    class FastAttention(ReferenceAttention):
        def provider(self):
            return "fast"

    class Vendor(TorchDevice):
        def _make_ops(self):
            return Fast()

        def _attention_class(self, spec):
            return FastAttention

    device = Vendor(info=DeviceInfo(index=0, name="vendor"))
    assert device.ops().provider("linear") == "fast"
    assert device.attention(SPEC).provider() == "fast"


def test_attention_beyond_the_reference_is_refused(device):
    """The refusal names the device and every reason."""
    with pytest.raises(UnsupportedError, match="somewhere") as caught:
        device.attention(replace(SPEC, kind="cross", dtype="int8"))
    assert len(caught.value.reasons) == 2


def test_cache_that_does_not_fit_is_an_out_of_memory_of_the_cache(device):
    """The worker lives on and learns how much was asked for."""
    attention = device.attention(SPEC)
    num_blocks = 1 << 50
    with pytest.raises(DeviceOutOfMemory, match="cache") as caught:
        attention.allocate(num_blocks)
    assert caught.value.tag == "cache"
    assert caught.value.requested_bytes == num_blocks * 16 * 8 * 4


def test_tensors_live_on_the_torch_device_that_was_named():
    """Every allocation and index of the reference follows the device's own string."""
    device = TorchDevice(info=DeviceInfo(index=0, name="shapes alone"), torch_device="meta")
    attention = device.attention(SPEC)
    cache = attention.allocate(3)
    assert cache.tensors["k"].device == torch.device("meta")
    attention.copy_blocks(cache, [0], [1])
