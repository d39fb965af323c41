"""The report: plain records, from which JSON, its schema and the page are made."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from quire.conformance.numerics import UNBOUNDED
from quire.conformance.trial import Outcome

SCHEMA_VERSION = "1.1"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one case."""

    id: str
    level: int
    op: str
    dtype: str
    outcome: str
    """`passed`, `failed`, `unsupported`; `excused` (failed, as expected) or `unexpected_pass`."""
    reason: str = ""
    error: float | None = None
    """Of the measurement with the least headroom; None: nothing was measured."""
    bound: float | None = None
    headroom: float | None = None
    """error / bound: above 1 is a failure."""
    provider: str = ""
    seconds: float = 0.0
    worker: str = ""
    extension: str = ""
    """The extension that the case belongs to; empty: its level."""


class RawRun(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of pytest leaves for the report."""

    seed: int
    level: int
    rows: list[Row]
    extensions: list[str] = []
    """Those that were tried."""


class Expectation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of excuse."""

    test: str
    """The exact id."""
    kind: str
    """`known-bug` or `hardware-limit`."""
    issue: str
    reason: str
    until: str
    """The version of the suite at which this line becomes an error."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one level is granted."""

    level: int
    is_granted: bool
    num_exceptions: int
    text: str


class ExtensionVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the run says about one extension."""

    name: str
    outcome: str
    """`granted`, `failed`, `not claimed`, `not tried`, or `not certifiable`: claimed, and the suite
    has no check for it."""
    num_exceptions: int
    claim: str
    """The words of the capabilities that claim it."""
    text: str


class VendorCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the backend cost its vendor, counted in its source."""

    files: int
    lines_of_code: int
    quire_modules: list[str]
    """Modules of Quire that it imports."""
    assignments: list[str]
    """`file:line` of each assignment onto an object of Quire's: patches."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the suite on one device."""

    schema_version: str
    is_sealed: bool
    """Whether the official command ran it: no conftest, ini or plug-in of anybody."""
    seed: int
    created: str
    level: int
    quire_version: str
    interface_version: str
    suite_hash: str
    """Of every file of the suite."""
    environment: dict[str, str]
    backend: str
    distribution: str
    device: str
    architecture: str
    is_torch: bool
    """Whether torch owns the device's tensors; if not, operators are tried through its Worker."""
    capabilities: dict[str, Any]
    verdicts: list[Verdict]
    hardware: str
    """What computed: `real`, or how it was imitated (`interpreted`, `simulated`)."""
    extensions_tried: list[str]
    extensions: list[ExtensionVerdict]
    counts: dict[str, int]
    missing: list[str]
    """Ids of the manifest that have no row."""
    problems: list[str]
    """What is wrong beside rows: lines of expectation that do not fit, ids of nobody."""
    expectations: list[Expectation]
    cost: VendorCost
    rows: list[Row]
    checksum: str = ""

    @property
    def is_passed(self) -> bool:
        """Whether the level asked for is granted, which includes those below."""
        return self.verdicts[-1].is_granted

    @property
    def headline(self) -> str:
        """The first line: what is granted, with how many exceptions."""
        sealed = "" if self.is_sealed else " (unsealed)"
        return f"{self.backend}: {self.verdicts[-1].text}{sealed}"


def row_of(outcome: Outcome, *, worker: str) -> Row:
    """The row of one case."""
    worst = outcome.worst
    return Row(
        id=outcome.case.id,
        level=outcome.case.level,
        op=outcome.case.op,
        dtype=outcome.case.dtype,
        outcome=outcome.outcome,
        reason=outcome.reason,
        error=None if worst is None else min(worst.error, UNBOUNDED),
        bound=None if worst is None else min(worst.bound, UNBOUNDED),
        headroom=None if worst is None else min(worst.headroom, UNBOUNDED),
        provider=outcome.provider,
        seconds=round(outcome.seconds, 4),
        worker=worker,
        extension=outcome.case.extension,
    )


def checksum_of(report: Report) -> str:
    """Over everything in the report but the checksum itself."""
    blank = msgspec.structs.replace(report, checksum="")
    encoded = msgspec.json.encode(blank, order="deterministic")
    return f"sha256:{hashlib.sha256(encoded).hexdigest()}"
