"""The contract's random numbers: number i of a seed, drawn on the host.

Every worker draws the same ones, so a sampled text does not depend on the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GAMMA = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, made odd."""
_MASK = (1 << 64) - 1
_BITS = 24
"""Of a float32's mantissa: 1 is never reached."""


def uniform(seeds: list[int], indices: list[int]) -> npt.NDArray[np.float32]:
    """Number `indices[r]` of the stream of `seeds[r]`: float32 [R] in [0, 1).

    SplitMix64, started at a hash of the seed: mix(mix(seed + gamma) + (index + 1) * gamma), of
    which the top 24 bits count.
    Source: Steele, Lea & Flood 2014, figure 14; constants of mix: Stafford's variant 13.
    """
    numbers = [
        _mix(_mix((seed + _GAMMA) & _MASK) + (index + 1) * _GAMMA)
        for seed, index in zip(seeds, indices, strict=True)
    ]
    return np.array([(n >> (64 - _BITS)) * 2.0**-_BITS for n in numbers], np.float32)


def _mix(z: int) -> int:
    """A bijection of 64 bits in which every input bit moves half of the output bits."""
    z &= _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
