"""Extension `quantization`: linear layers with weights of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from quire.conformance.cases import check, dtypes, product
from quire.conformance.checks import l1_ops
from quire.conformance.extension_recipes import EXTENSION_RECIPES
from quire.conformance.oracles import quantizing
from quire.conformance.recipes import SCALES, arrays_of, make_normal
from quire.conformance.trial import Trial
from quire.core.interface import Capabilities, QuantizedWeight

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


# --- quantizing at load ---------------------------------------------------------------------------

_SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"shape": (17, 75), "group_size": 0},
    "int4-g16": {"shape": (6, 80), "group_size": 16},
    "int4-g32": {"shape": (5, 160), "group_size": 32},
    "int4-g64": {"shape": (9, 192), "group_size": 64},
    "int4-g128": {"shape": (3, 256), "group_size": 128},
}


def _needs_scheme(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    name = "int4" if arguments["group_size"] else "int8"
    return "" if name in claims.quantizations else f"quantization {name!r} is not claimed"


@check(
    level=1,
    op="pack_quantized_linear",
    over=product(_SCHEMES, dtypes(), {name: {"scale": name} for name in SCALES}),
    needs=_needs_scheme,
)
def quantizes_to_the_defined_bits(
    trial: Trial, *, shape: tuple[int, int], group_size: int, dtype: str, scale: str
) -> None:
    """Weights that are quantized at load are the same on every device, by whomever it is done."""
    from quire.core.models.weights.quantization import quantize
    from quire.core.models.weights.quantization_spec import QuantizationSpec

    weight = make_normal(trial.rng, shape, dtype, SCALES[scale])
    # A row of nothing, rows on one side of zero, and rows in which parts of the range tie.
    weight[0], weight[1], weight[2] = 0, weight[1].abs(), -weight[2].abs()
    weight[-1], weight[-1, ::3] = SCALES[scale], -SCALES[scale] / 2
    ops = trial.device.ops()
    spec = QuantizationSpec(scheme="int4" if group_size else "int8", group_size=group_size or None)
    given = weight.to(str(trial.device.torch_device), copy=True)
    quantized = quantize(given, spec, ops=ops)
    trial.device.synchronize()
    trial.provider = ops.provider("pack_quantized_linear")
    (values,) = arrays_of({"weight": weight}, np.float32).values()
    wanted = quantizing.int4(values, group_size) if group_size else quantizing.int8(values)
    trial.require(bool((given.cpu() == weight).all()), "the weight that was given was written to")
    _require_form(trial, quantized, shape[1], group_size)
    for name, expected in wanted.items():
        found: Tensor = getattr(quantized, name)
        off = int((found.float().cpu().numpy() != expected.astype(np.float32)).sum())
        trial.require(
            off == 0,
            f"quantize_linear: {off} of {expected.size} {name} are not those of the definition; "
            "round after every operation, fuse none, and add the terms of the error in its order",
        )


def _require_form(
    trial: Trial, quantized: QuantizedWeight, num_inputs: int, group_size: int
) -> None:
    bits, activations, scales = (4, "group", "bfloat16") if group_size else (8, "token", "float32")
    got = (quantized.bits, quantized.group_size, quantized.num_inputs, quantized.activations)
    wanted = (bits, group_size, num_inputs, activations)
    trial.require(got == wanted, f"quantize_linear gave {got}, the definition says {wanted}")
    trial.require(
        str(quantized.scales.dtype) == f"torch.{scales}"
        and (quantized.zeros is None) == (bits == 8),
        f"quantize_linear: {bits} bits have scales in {scales} and "
        f"{'no zeros' if bits == 8 else 'zeros'}",
    )
