"""What every test has: one thread, no network, its own environment, its own random numbers.

torch is not imported here: the tests of the scheduler run without it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    import torch

# Before torch starts OpenMP: the workers of xdist share the cores, and more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    """No test sees what another one put into os.environ."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


def _seed_of(request: pytest.FixtureRequest) -> int:
    """The same number for the same test, on every machine and in every order."""
    return zlib.crc32(request.node.name.encode())


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers from numpy, the same ones for the same test."""
    return np.random.default_rng(_seed_of(request))


@pytest.fixture
def torch_rng(request: pytest.FixtureRequest) -> torch.Generator:
    """Random numbers from torch (`torch.randn(..., generator=torch_rng)`), the same for a test."""
    torch = pytest.importorskip("torch")
    return torch.Generator().manual_seed(_seed_of(request))
