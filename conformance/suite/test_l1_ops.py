"""Level 1, operators, from `quire.conformance.checks.l1_ops`."""

from __future__ import annotations

from quire.conformance.checks import l1_ops
from quire.conformance.collection import make_tests

globals().update(make_tests(l1_ops))
