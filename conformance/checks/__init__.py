"""The checks of levels 0 to 4 and of extensions, one module a subject.

A module `ext_NAME.py` in this folder is found by its name: it is the extension NAME. It may define
`claimed(claims: Capabilities) -> str`, what in the claims asks for it (empty: nothing), where
`quire.conformance.extensions` cannot read that from the claims by itself.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from quire.conformance.cases import EXTENSION_PREFIX
from quire.conformance.checks import (
    l0_boots,
    l1_attention,
    l1_ops,
    l1_sampling,
    l2_runner,
    l3_engine,
    l4_scale,
)

MODULES: tuple[ModuleType, ...] = (
    l0_boots,
    l1_ops,
    l1_sampling,
    l1_attention,
    l2_runner,
    l3_engine,
    l4_scale,
)
"""Of the levels, in the order of the manifest."""

EXTENSIONS: tuple[ModuleType, ...] = tuple(
    importlib.import_module(f"{__name__}.{found.name}")
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name)
    if found.name.startswith(EXTENSION_PREFIX)
)
"""Of the extensions, by name."""
