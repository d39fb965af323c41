"""A repaired interpreter and its launcher, for every check."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def launcher():
    from quire.kernels_triton import interpreter
    from quire.kernels_triton.launch import TABLES, DeviceLauncher, read_table

    assert interpreter.is_interpreting(), "run me with TRITON_INTERPRET=1"
    interpreter.install()
    return DeviceLauncher(read_table(TABLES / "interpreter.json"))
