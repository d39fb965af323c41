"""One random number for each sampled token, from its request's seed and its place in the output.

Counter-based: number i of a seed is a function of (seed, i) and of nothing else, so a token does
not depend on who else is in the batch, on chunking, on preemption, or on the device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
"""2**64 divided by the golden ratio, made odd: the stride of SplitMix64's counter."""
_BITS = 24
"""Of a float32's mantissa: every number k * 2**-24 is exact, and 1 is never reached."""


def uniform(seeds: UInt64s, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Number `indices[r]` of the stream of `seeds[r]`: float32 [R] in [0, 1).

    The stream is SplitMix64, started at a hash of the seed so that the streams of neighbouring
    seeds do not overlap: mix(mix(seed + gamma) + (index + 1) * gamma), of which the top 24 bits
    count.
    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 14;
    constants of mix: Stafford's variant 13.
    """
    with np.errstate(over="ignore"):
        start = _mix(seeds + _GAMMA)
        numbers = _mix(start + (indices.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    top = (numbers >> np.uint64(64 - _BITS)).astype(np.float32)
    return top * np.float32(2.0**-_BITS)


def _mix(z: UInt64s) -> UInt64s:
    """A bijection of 64 bits in which every input bit moves half of the output bits."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
