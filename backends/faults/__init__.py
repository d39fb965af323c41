"""A device that fails on purpose, to the letter of its options: for testing what an engine does.

    quire.LLM(model, device="faults", options={"faults.oom_at_step": "3"})

computes with the reference on host memory until the fault. Steps are counted as work of the device
since the cache was allocated: step 0 is the engine's warm-up, step 1 the first that serves. A list
`3,5` names several steps, `3+` every step from the third.

| option | what happens | where it is put in |
|---|---|---|
| `faults.oom_at_step` | the step is refused memory; the device lives on | `Queue.run` |
| `faults.lost_at_step` | the device is gone, from this step on | `Queue.run`, `Device.memory` |
| `faults.nan_logits_at_step` | the first row of the step's logits is NaN | `Ops.linear` |
| `faults.corrupt_block_at_step` | the first block of the step's first request is overwritten | \
`AttentionBackend.forward` |
| `faults.corrupt_with` | `nan` (default), or `noise`: finite numbers that are wrong | |
| `faults.hang_at_step` | the step takes `faults.hang_s` seconds, 60 if not given | `Queue.run` |
| `faults.slow_copies_ms` | each copy between host and device takes so much longer | \
`Queue.upload`, `Queue.download` |
| `faults.oom_at_load` | `1`: memory for weights is refused | `Ops.pack_linear` |
| `faults.oom_at_allocate` | `1`: memory for the cache is refused | `AttentionBackend.allocate` |

Device `faults:0` is synchronous and fails where a step is submitted; `faults:1` is asynchronous and
fails where somebody waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.core.interface import Backend, DeviceError, DeviceInfo, Probe

if TYPE_CHECKING:
    from quire.core.interface import Device

INFOS = (
    DeviceInfo(index=0, name="device that fails on purpose", architecture="faults"),
    DeviceInfo(index=1, name="asynchronous device that fails on purpose", architecture="faults"),
)


class FaultsBackend(Backend):
    """Offers a synchronous and an asynchronous device that fail when they are told to."""

    name = "faults"
    interface_version = "1.1"

    def probe(self) -> Probe:
        return Probe(devices=INFOS, problem="fails when it is told to; for tests", priority=-90)

    def open(self, index: int) -> Device:
        try:
            from quire.backends.faults.device import FaultsDevice
        except ImportError as error:
            raise DeviceError(
                f'faults computes with torch: {error}; pip install "quire[cpu]"'
            ) from error
        return FaultsDevice(INFOS[index], is_asynchronous=index == 1)
