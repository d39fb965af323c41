"""The checks of levels 0 to 2, one module a subject; each is a test file of the suite."""

from __future__ import annotations

from types import ModuleType

from quire.conformance.checks import l0_boots, l1_attention, l1_ops, l1_sampling, l2_runner

MODULES: tuple[ModuleType, ...] = (l0_boots, l1_ops, l1_sampling, l1_attention, l2_runner)
"""In the order of the manifest."""
