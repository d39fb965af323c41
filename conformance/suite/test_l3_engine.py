"""Level 3, from `quire.conformance.checks.l3_engine`."""

from __future__ import annotations

from quire.conformance.checks import l3_engine
from quire.conformance.collection import make_tests

globals().update(make_tests(l3_engine))
