"""Extension `quantization`: linear layers with weights of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.conformance.cases import check
from quire.conformance.checks import l1_ops
from quire.conformance.extension_recipes import EXTENSION_RECIPES
from quire.conformance.trial import Trial
from quire.core.interface import Capabilities

SCHEMES = ("int4", "int8")


def claimed(claims: Capabilities) -> str:
    """The words that claim the extension; empty: it is not claimed."""
    names = [name for name in SCHEMES if name in claims.quantizations]
    return f"quantization {', '.join(map(repr, names))}" if names else ""


def _needs_bits(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    """A device may claim one number of bits without the other."""
    variants = EXTENSION_RECIPES[arguments["op"]].variants
    wanted = [variants[arguments["variant"]]] if "variant" in arguments else variants.values()
    missing = {f"int{options['bits']}" for options in wanted} - claims.quantizations
    return f"quantization {', '.join(sorted(missing))} is not claimed" if missing else ""


@check(level=1, op="", over=l1_ops.numeric_cases("quantization"), needs=_needs_bits)
def numerics(trial: Trial, *, op: str, variant: str, dtype: str, scale: str) -> None:
    """The result is the formula's, with activations rounded as the weight says."""
    l1_ops.numerics(trial, op=op, variant=variant, dtype=dtype, scale=scale)


@check(level=1, op="", over=l1_ops.op_cases("quantization"), needs=_needs_bits)
def purity(trial: Trial, *, op: str, dtype: str) -> None:
    """Nothing is written."""
    l1_ops.purity(trial, op=op, dtype=dtype)


@check(level=1, op="", over=l1_ops.op_cases("quantization"), needs=_needs_bits)
def new_data(trial: Trial, *, op: str, dtype: str) -> None:
    """The same shapes with new data give the new answer."""
    l1_ops.new_data(trial, op=op, dtype=dtype)
