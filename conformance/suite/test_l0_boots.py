"""Level 0, from `quire.conformance.checks.l0_boots`."""

from __future__ import annotations

from quire.conformance.checks import l0_boots
from quire.conformance.collection import make_tests

globals().update(make_tests(l0_boots))
