"""The reference page of the interface says what the docstrings say."""

from __future__ import annotations

import pytest

pytest.importorskip("griffe")

import interface_reference

from quire.core import interface


def test_interface_page_is_what_the_docstrings_say():
    """Whoever changes a docstring writes the page again: python scripts/interface_reference.py."""
    page = interface_reference.PAGE.read_text(encoding="utf-8")
    assert page == interface_reference.render(), (
        "docs/interface.md is behind; run python scripts/interface_reference.py"
    )


def test_interface_page_has_every_name_that_is_exported():
    """Nothing public is left out."""
    page = interface_reference.render()
    missing = [name for name in interface.__all__ if f"`{name}" not in page]
    assert not missing


def test_interface_page_shows_signatures_as_written():
    """Keyword-only arguments and defaults are part of the contract."""
    page = interface_reference.render()
    assert "all_gather(x: Tensor, *, dim: int) -> Tensor" in page
    assert "`block_sizes: tuple[int, ...] = (16,)`" in page
