"""Extension `moe`: routing and experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.conformance.cases import check, dtypes, needs_claim
from quire.conformance.checks import l1_ops
from quire.conformance.expert_codes import in_codes, in_float8
from quire.conformance.trial import Trial
from quire.core.interface import Capabilities

_NEEDS = needs_claim("features", "moe")
_NEEDS_CODES = needs_claim("features", "quantized_experts")
_NEEDS_FLOAT8 = needs_claim("quantizations", "fp8")


def _needs_float8_experts(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    return _NEEDS_CODES(claims, arguments) or _NEEDS_FLOAT8(claims, arguments)


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


@check(level=1, op="experts", over=dtypes(), needs=_NEEDS_CODES)
def experts_in_codes(trial: Trial, *, dtype: str) -> None:
    """With weights of 4 and 8 bits, and inputs rounded as these say, of both products."""
    l1_ops.measure_otherwise(trial, "experts", dtype, in_codes, "experts in codes")


@check(level=1, op="experts", over=dtypes(), needs=_needs_float8_experts)
def experts_in_float8(trial: Trial, *, dtype: str) -> None:
    """With weights of 8-bit floats, scaled by rows and by groups, and inputs rounded likewise."""
    l1_ops.measure_otherwise(trial, "experts", dtype, in_float8, "experts in 8-bit floats")
