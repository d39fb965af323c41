"""The checks of levels 0 to 3, one module a subject; each is a test file of the suite."""

from __future__ import annotations

from types import ModuleType

from quire.conformance.checks import (
    l0_boots,
    l1_attention,
    l1_ops,
    l1_sampling,
    l2_runner,
    l3_engine,
)

MODULES: tuple[ModuleType, ...] = (
    l0_boots,
    l1_ops,
    l1_sampling,
    l1_attention,
    l2_runner,
    l3_engine,
)
"""In the order of the manifest."""
