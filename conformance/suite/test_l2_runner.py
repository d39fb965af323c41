"""Level 2, from `quire.conformance.checks.l2_runner`."""

from __future__ import annotations

from quire.conformance.checks import l2_runner
from quire.conformance.collection import make_tests

globals().update(make_tests(l2_runner))
