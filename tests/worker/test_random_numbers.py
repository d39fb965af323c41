"""The random numbers of a request depend on its seed and on the place in its output alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quire.core.worker.random_numbers import uniform

MASK = 2**64 - 1


def mix(z: int) -> int:
    """Stafford's variant 13 in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_uniform(seed: int, index: int) -> float:
    """One number, by the formula of the docstring."""
    gamma = 0x9E3779B97F4A7C15
    start = mix((seed + gamma) & MASK)
    return (mix((start + (index + 1) * gamma) & MASK) >> 40) / 2**24


def draw(seeds: list[int], indices: list[int]) -> np.ndarray:
    return uniform(np.array(seeds, np.uint64), np.array(indices, np.int64))


@given(st.lists(st.tuples(st.integers(0, MASK), st.integers(0, 2**31)), min_size=1, max_size=20))
def test_uniform_any_seed_is_the_documented_formula(pairs):
    """The vectorised hash equals the scalar one, overflow included."""
    numbers = draw([seed for seed, _ in pairs], [index for _, index in pairs])
    assert numbers.dtype == np.float32
    assert numbers.tolist() == [slow_uniform(seed, index) for seed, index in pairs]


def test_uniform_first_numbers_never_change():
    """A user's seed gives the same text after an upgrade."""
    assert draw([0, 0, 1, MASK], [0, 1, 0, 7]).tolist() == [
        0.6524484753608704,
        0.7012121081352234,
        0.3681895136833191,
        0.7238582372665405,
    ]


def test_uniform_many_numbers_are_flat_and_uncorrelated():
    """Neighbouring seeds and neighbouring places share nothing that a test of this size sees."""
    seeds, indices = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300))
    numbers = uniform(seeds.ravel(), indices.ravel()).reshape(300, 300).astype(np.float64)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = numbers.size / 64
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert 20 < chi_squared < 130  # 63 degrees of freedom; beyond is less likely than 1e-6
    for shifted in (numbers[1:] * numbers[:-1], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.005
    assert len(np.unique(numbers[0])) > 290
