"""Level 1, attention, from `quire.conformance.checks.l1_attention`."""

from __future__ import annotations

from quire.conformance.checks import l1_attention
from quire.conformance.collection import make_tests

globals().update(make_tests(l1_attention))
