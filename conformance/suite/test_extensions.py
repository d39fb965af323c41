"""The checks of every extension, from the modules `quire.conformance.checks.ext_*`."""

from __future__ import annotations

from quire.conformance.checks import EXTENSIONS
from quire.conformance.collection import make_tests

for _module in EXTENSIONS:
    globals().update(make_tests(_module))
