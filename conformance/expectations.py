"""The only excuse: a TOML file of exact ids with reason, issue and end, held strictly.

[[expect]]
test   = "test_l1_attention.py::test_mixed_batch[gqa2-d128-b16-bfloat16]"
kind   = "known-bug"                    # or "hardware-limit"
issue  = "https://example.org/issues/12"
reason = "the tile for head size 128 spills"
until  = "1.6"                          # the version of Quire at which this line is an error
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import msgspec
from packaging.version import InvalidVersion, Version

from quire.conformance.records import Expectation, Row
from quire.core.errors import ConfigError

_KINDS = ("known-bug", "hardware-limit")


def read_expectations(path: Path) -> list[Expectation]:
    """The lines of a file.

    Raises: ConfigError, naming the line, for a file that is not as the module says.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        lines = msgspec.convert(content.get("expect", []), type=list[Expectation])
    except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(
            f"expectations {path}: {error}; each [[expect]] has test, kind, issue, reason, until"
        ) from error
    if unknown := set(content) - {"expect"}:
        raise ConfigError(f"expectations {path}: only [[expect]] is known, not {sorted(unknown)}")
    for line in lines:
        _check(line, path)
    return lines


def _check(line: Expectation, path: Path) -> None:
    where = f"expectations {path}: {line.test!r}"
    if line.kind not in _KINDS:
        raise ConfigError(f"{where}: kind {line.kind!r} is none of {', '.join(_KINDS)}")
    if not (line.reason.strip() and line.issue.strip()):
        raise ConfigError(f"{where}: an excuse needs a reason and an issue")
    try:
        Version(line.until)
    except InvalidVersion as error:
        raise ConfigError(f"{where}: until is no version: {error}") from error


def apply_expectations(
    rows: Sequence[Row], expectations: Sequence[Expectation], *, manifest: set[str], version: str
) -> tuple[list[Row], list[str]]:
    """The rows with excuses applied, and what is wrong with the excuses themselves.

    A failure that was expected is `excused`; a pass that was not is `unexpected_pass`, which fails.
    """
    by_id = {line.test: line for line in expectations}
    problems = [
        f"{line.test}: no test of the suite has this id"
        for line in expectations
        if line.test not in manifest
    ]
    if len(by_id) < len(expectations):
        problems.append("a test is expected to fail twice")
    problems += [
        f"{line.test}: expired with version {line.until} (this is {version})"
        for line in expectations
        if Version(version) >= Version(line.until)
    ]
    return [_excused(row, by_id.get(row.id)) for row in rows], problems


def _excused(row: Row, line: Expectation | None) -> Row:
    if line is None:
        return row
    if row.outcome == "failed":
        reason = f"{line.kind}: {line.reason} ({line.issue}, until {line.until}). {row.reason}"
        return msgspec.structs.replace(row, outcome="excused", reason=reason)
    reason = f"was expected to fail ({line.reason}) and {row.outcome}; remove the line"
    return msgspec.structs.replace(row, outcome="unexpected_pass", reason=reason)
