"""The environment in which the vendor's package of the examples is installed."""

from __future__ import annotations

import pytest
from vendor_environment import ROOT, VendorEnvironment, make_environment


@pytest.fixture(scope="session")
def acme_environment(tmp_path_factory: pytest.TempPathFactory) -> VendorEnvironment:
    """An environment in which examples/vendor_backend is installed."""
    folder = tmp_path_factory.mktemp("acme")
    environment = make_environment(folder / "environment")
    environment.check(["pip", "install", str(ROOT / "examples/vendor_backend")], cwd=folder)
    return environment
