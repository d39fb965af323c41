"""docs/write-a-backend.md, followed to the letter: its files are written, its commands are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from vendor_environment import ROOT, VendorEnvironment, make_environment

pytest.importorskip("torch")

GUIDE = ROOT / "docs" / "write-a-backend.md"
EXAMPLE = ROOT / "examples" / "vendor_backend"

_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """One block of code: a file, or commands."""

    language: str
    path: str
    text: str


def read_blocks() -> list[Block]:
    """The guide's blocks in order."""
    return [Block(*found) for found in _FENCE.findall(GUIDE.read_text(encoding="utf-8"))]


def follow(blocks: list[Block], folder: Path, environment: VendorEnvironment) -> list[str]:
    """Writes the files and runs the commands; returns what each block of commands printed."""
    printed = []
    for block in blocks:
        if block.path:
            path = folder / block.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        else:
            printed.append(environment.check(block.text, cwd=folder, timeout=500))
    return printed


def test_guide_has_files_and_commands_alone():
    """Nothing in it is a fragment that a reader would have to place."""
    blocks = read_blocks()
    assert len(blocks) == GUIDE.read_text(encoding="utf-8").count("\n```") // 2
    assert all(block.path or block.language == "sh" for block in blocks)
    assert sum(block.language == "sh" for block in blocks) == 4


def test_guide_ends_with_the_package_of_the_examples():
    """Page and example are one thing, so neither grows old alone."""
    final = {block.path: block.text for block in read_blocks() if block.path}
    final.pop("README.md")
    for path, text in final.items():
        assert text == (EXAMPLE / path).read_text(encoding="utf-8"), path
    python = {p.relative_to(EXAMPLE).as_posix() for p in EXAMPLE.rglob("*.py")}
    assert python | {"pyproject.toml", ".github/workflows/conformance.yml"} == set(final)


def test_guide_followed_to_its_first_level_boots(tmp_path):
    """An empty folder, an hour later: found, healthy, level 0."""
    blocks = read_blocks()
    first = next(i for i, block in enumerate(blocks) if block.language == "sh")
    (said,) = follow(blocks[: first + 1], tmp_path, make_environment(tmp_path / "environment"))
    assert "Acme One" in said
    assert "acme: level 0" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_guide_followed_to_its_end_certifies(tmp_path):
    """Every command of the page in its order, to the report and the badge."""
    environment = make_environment(tmp_path / "environment")
    said = follow(read_blocks(), tmp_path, environment)
    assert re.search(r"rms_norm\W+acme", said[1]), said[1]
    assert "passed" in said[2]
    assert "acme: level 3 (" in said[3]
    assert "complete, unmodified and honest" in said[3]
    assert "zero-patch badge granted" in said[3]
    assert (tmp_path / "out" / "report.html").exists()
