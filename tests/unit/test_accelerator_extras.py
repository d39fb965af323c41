"""What `pip install "quire[cuda]"` and its like pull, held to the package metadata and the page."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
PAGE = (ROOT / "docs" / "accelerators.md").read_text(encoding="utf-8")
TORCH = {"jinja2", "safetensors", "tokenizers", "torch", "transformers"}
PULLED = {
    "torch": TORCH,
    "cpu": TORCH,
    "cuda": TORCH | {"triton"},
    "rocm": TORCH,
    "xpu": TORCH,
    "ipex": TORCH | {"intel-extension-for-pytorch"},
}


def names_of(extra):
    """The distributions of an extra, its own extras unfolded."""
    found = set()
    for line in EXTRAS[extra]:
        wanted = Requirement(line)
        if wanted.name == "quire":
            found |= set().union(*(names_of(inner) for inner in wanted.extras))
        else:
            found.add(wanted.name)
    return found


@pytest.mark.parametrize("extra", PULLED)
def test_extra_pulls_what_is_written_down(extra):
    """No vendor's package comes with another vendor's extra."""
    assert names_of(extra) == PULLED[extra]


@pytest.mark.parametrize("extra", ["cuda", "rocm", "xpu", "ipex"])
def test_page_names_every_device_extra_and_what_it_adds(extra):
    """What an extra pulls is written where people look for it."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `quire[{extra}]`"))
    assert all(name in row for name in names_of(extra) - TORCH)
    for name in TORCH:
        assert f"`{name}`" in PAGE


def test_ipex_holds_torch_to_the_one_version_that_it_loads_beside():
    """With any other torch the extension ends the process at import."""
    allowed = SpecifierSet("")
    for line in EXTRAS["torch"] + EXTRAS["ipex"]:
        wanted = Requirement(line)
        if wanted.name == "torch":
            allowed &= wanted.specifier
    versions = [f"2.{minor}.0" for minor in range(6, 15)]
    assert [version for version in versions if version in allowed] == ["2.8.0"]


@pytest.mark.parametrize("extra", ["cuda", "rocm", "xpu"])
def test_installed_metadata_says_the_same(extra):
    """What pip reads is what the project file says."""
    installed = {
        Requirement(line).name
        for line in importlib.metadata.requires("quire") or ()
        if (marker := Requirement(line).marker)
        and marker.evaluate({"extra": extra, "platform_system": "Linux"})
        and not marker.evaluate({"extra": "", "platform_system": "Linux"})
    }
    own = {Requirement(line).name for line in EXTRAS[extra]}
    assert installed == own
