"""Turns checks into pytest tests, with the ids of the cases."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from quire.conformance.cases import Case, cases_of

ATTRIBUTE = "conformance_case"
"""Where a test without variants carries its case."""


def make_tests(module: ModuleType) -> dict[str, Callable[..., None]]:
    """One test function a check of `module`, parametrised over its cases."""
    by_name: dict[str, list[Case]] = {}
    for case in cases_of(module):
        name = case.id.partition("::")[2].partition("[")[0]
        by_name.setdefault(name, []).append(case)
    return {name: _make_test(cases) for name, cases in by_name.items()}


def case_of(item: pytest.Item) -> Case | None:
    """The case of a collected test; None: it is none of the suite's."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else getattr(_function(item), ATTRIBUTE, None)
    return case if isinstance(case, Case) else None


def _function(item: pytest.Item) -> Any:
    return getattr(item, "function", None)


def _make_test(cases: list[Case]) -> Callable[..., None]:
    if not cases[0].variant:
        return _plain(cases[0])

    @pytest.mark.parametrize("case", [pytest.param(case, id=case.variant) for case in cases])
    def test(case: Case, conformance: Any, record_property: Any) -> None:
        conformance.run(case, record_property)

    test.__doc__ = cases[0].function.__doc__
    made: Callable[..., None] = test
    return made


def _plain(case: Case) -> Callable[..., None]:
    def test(conformance: Any, record_property: Any) -> None:
        conformance.run(case, record_property)

    test.__doc__ = case.function.__doc__
    setattr(test, ATTRIBUTE, case)
    return test
