"""Extensions: reported apart from the levels, and never granted unseen."""

from __future__ import annotations

from types import ModuleType

import msgspec
import pytest

pytest.importorskip("torch")

from quire.conformance import checks
from quire.conformance.cases import all_cases, cases_of, check, extension_cases
from quire.conformance.extensions import (
    chosen_extensions,
    claims_of,
    judge_extensions,
    known_extensions,
)
from quire.conformance.records import Row
from quire.conformance.verdicts import judge, manifest_of, manifest_with
from quire.core.errors import ConfigError
from quire.core.interface import Capabilities

RECORDS = Capabilities(step_mode="capture")


def rows_of(name: str, outcome: str) -> list[Row]:
    return [
        Row(id=c.id, level=c.level, op=c.op, dtype=c.dtype, outcome=outcome, extension=name)
        for c in extension_cases([name])
    ]


def verdict(name: str, rows, *, tried=("graphs",), claims=RECORDS):
    found = judge_extensions(rows, tried=tried, capabilities=claims)
    return next(v for v in found if v.name == name)


def test_extension_all_checks_passed_is_granted():
    """What is claimed and held."""
    assert verdict("graphs", rows_of("graphs", "passed")).outcome == "granted"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (rows_of("graphs", "passed")[1:], "0 failed, 1 missing"),
        (rows_of("graphs", "failed")[:1] + rows_of("graphs", "passed")[1:], "1 failed"),
        (rows_of("graphs", "unsupported"), "none of its checks could be tried"),
    ],
    ids=["missing", "failed", "all-excused"],
)
def test_extension_anything_else_is_failed(rows, words):
    """A claim is granted whole or not at all."""
    found = verdict("graphs", rows)
    assert (found.outcome, words in found.text) == ("failed", True), found


def test_extension_excused_failure_is_counted():
    """Granted with k exceptions, never just granted."""
    rows = rows_of("graphs", "excused")[:1] + rows_of("graphs", "passed")[1:]
    found = verdict("graphs", rows)
    assert (found.outcome, found.text) == ("granted", "granted with 1 exception")


def test_extension_not_claimed_or_not_tried_says_so():
    """Nothing is granted by silence."""
    rows = rows_of("graphs", "unsupported")
    assert verdict("graphs", rows, claims=Capabilities()).outcome == "not claimed"
    assert verdict("graphs", [], tried=()).outcome == "not tried"


def test_extension_claimed_without_a_check_is_said_aloud():
    """Who reads the report knows that nobody looked."""
    claims = Capabilities(extensions={"acme:warp": "bends numbers"})
    found = verdict("acme:warp", [], claims=claims)
    assert (found.outcome, found.text) == (
        "not certifiable",
        "claimed, not certifiable by this suite",
    )


@pytest.mark.parametrize(
    ("claims", "name"),
    [
        ({"step_mode": "capture"}, "graphs"),
        ({"cache_dtypes": ("float32", "float8_e4m3fn")}, "fp8_cache"),
        ({"attention_kinds": frozenset({"causal", "cross"})}, "cross"),
        ({"attention_features": frozenset({"acme:dots"})}, "acme:dots"),
        ({"quantizations": frozenset({"acme:int3"})}, "acme:int3_weights"),
        ({"can_sleep": True}, "sleep"),
    ],
)
def test_claims_of_capabilities_names_each_beyond_the_levels(claims, name):
    """Every way to claim more than a level tries is seen."""
    assert name in claims_of(Capabilities(**claims))
    assert name not in claims_of(Capabilities())


def test_chosen_extensions_leaves_out_what_needs_a_higher_level():
    """`--level 0` stays a matter of seconds."""
    assert chosen_extensions("all", 0) == []
    assert "graphs" in chosen_extensions("all", 2)
    assert chosen_extensions("graphs", 0) == ["graphs"]
    assert chosen_extensions("none", 3) == []
    with pytest.raises(ConfigError, match=r"this suite can certify .*graphs"):
        chosen_extensions("graphs,warp", 3)


def test_levels_know_nothing_of_extensions():
    """A failed extension denies no level, and a passed one grants none."""
    level = [
        Row(id=name, level=0, op="device", dtype="", outcome="passed") for name in manifest_of(0)
    ]
    failed = [msgspec.structs.replace(r, level=0) for r in rows_of("graphs", "failed")]
    assert judge([*level, *failed], level=0, problems=[])[0].is_granted
    assert not set(manifest_of(4)) & {case.id for case in extension_cases()}
    assert set(manifest_with(0, ["graphs"])) == {r.id for r in (*level, *failed)}


def test_module_of_an_extension_is_all_that_it_takes():
    """Found by its name; the ids say whose they are."""
    assert set(known_extensions()) == {
        module.__name__.rpartition(".")[2].removeprefix("ext_") for module in checks.EXTENSIONS
    }
    module = ModuleType("quire.conformance.checks.ext_warp")

    @check(level=1, op="warp")
    def bends(trial):
        """Bends."""

    module.bends = bends
    (case,) = cases_of(module)
    assert (case.id, case.extension) == ("test_extensions.py::test_warp_bends", "warp")


def test_ids_are_unique_over_levels_and_extensions():
    """An expectation names one test."""
    ids = [case.id for case in (*all_cases(), *extension_cases())]
    assert len(set(ids)) == len(ids)
