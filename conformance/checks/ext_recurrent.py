"""Extension `recurrent`: convolutions and scans that carry a state."""

from __future__ import annotations

from quire.conformance.cases import check, needs_claim
from quire.conformance.checks import l1_ops
from quire.conformance.recurrence_recipes import in_pages
from quire.conformance.trial import Trial

_NEEDS = needs_claim("features", "recurrent")


@check(level=1, op="", over=l1_ops.numeric_cases("recurrent"), needs=_NEEDS)
def numerics(trial: Trial, *, op: str, variant: str, dtype: str, scale: str) -> None:
    """Results and states are the formula's, as near as honest rounding allows."""
    l1_ops.numerics(trial, op=op, variant=variant, dtype=dtype, scale=scale)


@check(level=1, op="", over=l1_ops.op_cases("recurrent"), needs=_NEEDS)
def purity(trial: Trial, *, op: str, dtype: str) -> None:
    """Only the states are written, and nothing around them."""
    l1_ops.purity(trial, op=op, dtype=dtype)


@check(level=1, op="", over=l1_ops.op_cases("recurrent"), needs=_NEEDS)
def new_data(trial: Trial, *, op: str, dtype: str) -> None:
    """The same shapes with new data give the new answer."""
    l1_ops.new_data(trial, op=op, dtype=dtype)


@check(
    level=1,
    op="",
    over=l1_ops.op_cases("recurrent"),
    needs=needs_claim("features", "state_slots"),
)
def states_in_pages(trial: Trial, *, op: str, dtype: str) -> None:
    """With slots, states are read and written where they lie, and other blocks keep their bits."""
    l1_ops.measure_otherwise(trial, op, dtype, in_pages, "states in a page")
