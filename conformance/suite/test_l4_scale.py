"""Level 4, from `quire.conformance.checks.l4_scale`."""

from __future__ import annotations

from quire.conformance.checks import l4_scale
from quire.conformance.collection import make_tests

globals().update(make_tests(l4_scale))
