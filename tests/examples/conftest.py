"""The environments in which the vendors' packages of the examples are installed."""

from __future__ import annotations

import pytest
from vendor_environment import ROOT, VendorEnvironment, make_environment


@pytest.fixture(scope="session")
def acme_environment(tmp_path_factory: pytest.TempPathFactory) -> VendorEnvironment:
    """An environment in which examples/vendor_backend is installed."""
    return _environment_with("vendor_backend", tmp_path_factory)


@pytest.fixture(scope="session")
def jax_environment(tmp_path_factory: pytest.TempPathFactory) -> VendorEnvironment:
    """An environment in which examples/jax_backend is installed."""
    return _environment_with("jax_backend", tmp_path_factory)


def _environment_with(example: str, tmp_path_factory: pytest.TempPathFactory) -> VendorEnvironment:
    folder = tmp_path_factory.mktemp(example)
    environment = make_environment(folder / "environment")
    environment.check(["pip", "install", str(ROOT / "examples" / example)], cwd=folder)
    return environment
