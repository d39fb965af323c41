"""Level 1, sampling, from `quire.conformance.checks.l1_sampling`."""

from __future__ import annotations

from quire.conformance.checks import l1_sampling
from quire.conformance.collection import make_tests

globals().update(make_tests(l1_sampling))
