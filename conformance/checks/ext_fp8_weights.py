"""Extension `fp8_weights`: linear layers whose weights, and rounded inputs, are 8-bit floats."""

from __future__ import annotations

from typing import Any

import numpy as np

from quire.conformance.buffers import check_all, guard_all
from quire.conformance.cases import check, needs_claim
from quire.conformance.float8_recipe import FLOAT8_RECIPE
from quire.conformance.recipes import SCALES, arrays_of
from quire.conformance.trial import Trial

_OP = "pack_quantized_linear"
_NEEDS = needs_claim("quantizations", "fp8")
_DTYPES = ("float32", "float16", "bfloat16")
_CASES: dict[str, dict[str, Any]] = {
    f"{variant}-{dtype}-{scale}": {"variant": variant, "dtype": dtype, "scale": scale}
    for variant in FLOAT8_RECIPE.variants
    for dtype in _DTYPES
    for scale in SCALES
}


@check(level=1, op=_OP, over=_CASES, needs=_NEEDS)
def numerics(trial: Trial, *, variant: str, dtype: str, scale: str) -> None:
    """The result is the formula's, with activations rounded as the weight says; nothing is written.

    The same record three times over with new data: what is kept between calls is the weight alone.
    """
    options = {**FLOAT8_RECIPE.variants[variant], "dtype": dtype}
    device = trial.device
    for number in range(1 + 2 * (scale == "normal")):
        inputs = FLOAT8_RECIPE.make(trial.rng, dtype, SCALES[scale], options)
        guarded = guard_all(inputs, str(device.torch_device))
        views = {name: buffer.view for name, buffer in guarded.items()}
        out = FLOAT8_RECIPE.call(device.ops(), views, options)["out"]
        device.synchronize()
        trial.provider = device.ops().provider(_OP)
        trial.measure(
            f"{_OP}: call number {number + 1} with weights in 8-bit floats (out)",
            out,
            FLOAT8_RECIPE.expect(arrays_of(inputs, np.float64), options)["out"],
            FLOAT8_RECIPE.expect(arrays_of(inputs, np.float32), options)["out"],
            tolerance="quantised",
            hint=FLOAT8_RECIPE.hint,
        )
        check_all(guarded, writes=set())
