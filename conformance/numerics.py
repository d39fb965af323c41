"""How far from the truth a device may be: a multiple of what honest rounding costs.

    max |out - ref| <= a * max |base - ref| + b * u * max |ref| + eta

once over the tensor and once for each row (its last dimension). `ref` is the float64 oracle, `base`
the same formula in float32 rounded once to the dtype, u the dtype's unit roundoff and eta its
smallest positive number. A constant tolerance would not do: the outputs of a softmax shrink with
the length of the context, so that with 1e-2 a kernel that ignores the last of 4096 tokens passes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance from 1 to the next number."""
SMALLEST = {"float32": 2.0**-126, "float16": 2.0**-24, "bfloat16": 2.0**-126}
"""Below this a result may be flushed to zero, as accelerators do with float32's subnormals."""
UNBOUNDED = 1e300
"""Stands for infinity in reports: JSON has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """One class of operators: its factors, and why they are what they are."""

    base_factor: float
    """a of the rule."""
    roundoffs: float
    """b of the rule for half precision."""
    float32_roundoffs: float
    """b for float32, where base and device round in the same places and differ by order alone."""
    max_roundoffs: float
    """The bound never exceeds so many u * max |ref| of the whole tensor, however poor the base."""
    reason: str


TOLERANCES: dict[str, Tolerance] = {
    "exact": Tolerance(
        base_factor=0,
        roundoffs=0,
        float32_roundoffs=0,
        max_roundoffs=0,
        reason="copies, look-ups and integers leave nothing to round",
    ),
    "elementwise": Tolerance(
        base_factor=2,
        roundoffs=2,
        float32_roundoffs=8,
        max_roundoffs=16,
        reason="twice the baseline, as FlashAttention's tests; in float32 the exponential, "
        "tanh and erf of a vector unit are good to about two units in the last place, which are "
        "four roundoffs, and up to four more operations around them round once each",
    ),
    "reduction": Tolerance(
        base_factor=2,
        roundoffs=2,
        float32_roundoffs=16,
        max_roundoffs=64,
        reason="honest orders of summation differ by some units in float32, where nothing "
        "dishonest is near: products in 10 or 11 bits are off by thousands; in half precision "
        "honest kernels stay below 87 % and accumulation in half begins at 121 %",
    ),
    "attention": Tolerance(
        base_factor=2,
        roundoffs=2,
        float32_roundoffs=32,
        max_roundoffs=128,
        reason="two reductions and an exponential follow each other, and a score's rounding is "
        "multiplied by its size; one dropped token of 4096 is 2000 units off in float32, and at "
        "least twelve times the bound in half precision",
    ),
    "recurrence": Tolerance(
        base_factor=2,
        roundoffs=2,
        float32_roundoffs=128,
        max_roundoffs=512,
        reason="a state is summed over all time and then summed once more, and what comes out may "
        "be small beside what was added; over 40 seeds an honest step by step scan reaches a third "
        "of the bound, and chunked forms order their sums in yet another way; a state kept in "
        "bfloat16 is thousands of units off",
    ),
    "quantised": Tolerance(
        base_factor=2,
        roundoffs=4,
        float32_roundoffs=16,
        max_roundoffs=64,
        reason="the weights are rounded before the oracle sees them; what is left is a reduction "
        "whose scales multiply its rounding",
    ),
}
"""By `OpSpec.tolerance`. The one place of these numbers; no backend may change them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How one result compares: the row (or the whole) with the least headroom."""

    error: float
    bound: float
    where: str

    @property
    def headroom(self) -> float:
        """Error / bound: above 1 is a failure."""
        if self.error == 0:
            return 0.0
        return min(self.error / self.bound, UNBOUNDED) if self.bound else UNBOUNDED

    @property
    def is_within(self) -> bool:
        """Whether the device passed."""
        return self.headroom <= 1


def compare(out: Array, ref: Array, base: Array, *, dtype: str, tolerance: str) -> Measurement:
    """Holds `out` against `ref` (both float64, the same shape) by the rule of the module."""
    if out.shape != ref.shape:
        return Measurement(
            error=UNBOUNDED, bound=0.0, where=f"shape {out.shape} instead of {ref.shape}"
        )
    if out.size == 0:
        return Measurement(error=0.0, bound=0.0, where="nothing")
    width = ref.shape[-1] if ref.ndim > 1 else 1
    out, ref, base = (x.reshape(-1, width) for x in (out, ref, base))
    errors, base_errors = _distance(out, ref), _distance(base, ref)
    sizes = np.where(np.isfinite(ref), np.abs(ref), 0.0)
    limit = _bound(base_errors.max(), sizes.max(), sizes.max(), dtype, tolerance)
    whole = Measurement(error=float(errors.max()), bound=limit, where="the whole tensor")
    return max([whole, *_rows(errors, base_errors, sizes, dtype, tolerance)], key=_badness)


def compare_two(
    out: Array, other: Array, *, dtype: str, tolerance: str, conditioning: Array | float = 0.0
) -> Measurement:
    """Holds what one device gave against what another gave for the same inputs.

    Neither is the truth. Each may be off by the bound of the rule, with one honest rounding for the
    baseline's error, so that two may be twice that apart. `conditioning`, for each row or for all,
    is by how much the formula multiplies what float32 rounds on the way.
    """
    if out.shape != other.shape:
        where = f"shape {out.shape} instead of {other.shape}"
        return Measurement(error=UNBOUNDED, bound=0.0, where=where)
    if out.size == 0:
        return Measurement(error=0.0, bound=0.0, where="nothing")
    width = other.shape[-1] if other.ndim > 1 else other.size
    out, other = out.reshape(-1, width), other.reshape(-1, width)
    errors = _distance(out, other).max(axis=-1)
    both_nan = np.isnan(out) & np.isnan(other)
    if both_nan.any():
        errors = np.where(both_nan, 0.0, _distance(out, other)).max(axis=-1)
    sizes = np.where(np.isfinite(other), np.abs(other), 0.0).max(axis=-1)
    rounding = UNIT_ROUNDOFF.get(dtype, UNIT_ROUNDOFF["float16"])
    factor = TOLERANCES[tolerance].base_factor * UNIT_ROUNDOFF["float32"]
    passed_on = factor * sizes * np.broadcast_to(conditioning, sizes.shape)
    rows = [
        Measurement(
            error=float(error),
            bound=2 * (_bound(rounding * size, size, sizes.max(), dtype, tolerance) + more),
            where=f"row {row}",
        )
        for row, (error, size, more) in enumerate(
            zip(errors, sizes.tolist(), passed_on.tolist(), strict=True)
        )
    ]
    return max(rows, key=_badness)


def _rows(
    errors: Array, base_errors: Array, sizes: Array, dtype: str, tolerance: str
) -> list[Measurement]:
    peak = float(sizes.max())
    return [
        Measurement(
            error=float(error.max()),
            bound=_bound(float(base.max()), float(size.max()), peak, dtype, tolerance),
            where=f"row {row}",
        )
        for row, (error, base, size) in enumerate(zip(errors, base_errors, sizes, strict=True))
    ]


def _badness(measurement: Measurement) -> float:
    return measurement.headroom


def _bound(base_error: float, size: float, peak: float, dtype: str, tolerance: str) -> float:
    rule = TOLERANCES[tolerance]
    if rule.max_roundoffs == 0:
        return 0.0
    u = UNIT_ROUNDOFF[dtype]
    factor = rule.float32_roundoffs if dtype == "float32" else rule.roundoffs
    wanted = rule.base_factor * base_error + factor * u * size
    return float(min(wanted, rule.max_roundoffs * u * peak) + SMALLEST[dtype])


def _distance(a: Array, b: Array) -> Array:
    """|a - b|; equal infinities are at no distance, NaN is at the greatest."""
    with np.errstate(invalid="ignore"):
        distance = np.where(a == b, 0.0, np.abs(a - b))
    return np.nan_to_num(distance, nan=UNBOUNDED, posinf=UNBOUNDED)
