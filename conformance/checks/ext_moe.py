"""Extension `moe`: routing and experts."""

from __future__ import annotations

from quire.conformance.cases import check, dtypes, needs_claim
from quire.conformance.checks import l1_ops
from quire.conformance.expert_codes import in_codes
from quire.conformance.trial import Trial

_NEEDS = needs_claim("features", "moe")


@check(level=1, op="", over=l1_ops.numeric_cases("moe"), needs=_NEEDS)
def numerics(trial: Trial, *, op: str, variant: str, dtype: str, scale: str) -> None:
    """The result is the formula's, as near as honest rounding in this dtype allows."""
    l1_ops.numerics(trial, op=op, variant=variant, dtype=dtype, scale=scale)


@check(level=1, op="", over=l1_ops.op_cases("moe"), needs=_NEEDS)
def purity(trial: Trial, *, op: str, dtype: str) -> None:
    """Only what the specification lists under `writes` is written, and nothing around it."""
    l1_ops.purity(trial, op=op, dtype=dtype)


@check(level=1, op="", over=l1_ops.op_cases("moe"), needs=_NEEDS)
def new_data(trial: Trial, *, op: str, dtype: str) -> None:
    """The same shapes with new data, and so other experts, give the new answer."""
    l1_ops.new_data(trial, op=op, dtype=dtype)


@check(level=1, op="experts", over=dtypes(), needs=needs_claim("features", "quantized_experts"))
def experts_in_codes(trial: Trial, *, dtype: str) -> None:
    """With weights of 4 and 8 bits, and inputs rounded as these say, of both products."""
    l1_ops.measure_otherwise(trial, "experts", dtype, in_codes, "experts in codes")
