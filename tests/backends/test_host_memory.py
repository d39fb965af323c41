"""The peak of host memory, which sizes the cache where memory is shared with the machine."""

from __future__ import annotations

from pathlib import Path

import torch

from quire.backends.reference import TorchDevice
from quire.backends.reference.host_memory import PeakMemory
from quire.core.interface import DeviceInfo

_MIB = 1 << 20


def test_peak_sees_memory_that_was_given_back() -> None:
    """What is free again at the end was needed all the same."""
    device = TorchDevice(info=DeviceInfo(index=0, name="host"))

    def take_and_give_back() -> None:
        torch.ones(64 * _MIB, dtype=torch.uint8)

    assert 60 * _MIB < device.measure_peak_bytes(take_and_give_back) < 100 * _MIB


def test_peak_of_nothing_is_about_nothing() -> None:
    """The mark begins anew: what came before is not counted."""
    torch.ones(64 * _MIB, dtype=torch.uint8)
    with PeakMemory() as peak:
        pass
    assert peak.size_bytes < 8 * _MIB


def test_peak_without_the_systems_help_is_zero(tmp_path: Path) -> None:
    """A system that does not tell harms nothing; shapes decide then."""
    with PeakMemory(tmp_path / "no" / "proc") as peak:
        torch.ones(_MIB)
    assert peak.size_bytes == 0
