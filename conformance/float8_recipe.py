"""How linear layers with weights in 8-bit floats are tried; see `recipes` for what a recipe is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from quire.conformance.oracles import layers
from quire.conformance.recipes import Array, Inputs, Options, Recipe, make_normal
from quire.core.interface import Ops, QuantizedWeight

_NO_NUMBERS = (0x7F, 0xFF)
_VARIANTS: dict[str, Options] = {
    "rows": {"shape": (5, 96, 33), "group_size": 0, "activations": "token"},
    "groups": {"shape": (19, 256, 48), "group_size": 64, "activations": "group"},
    "groups-by-token": {"shape": (3, 128, 20), "group_size": 32, "activations": "token"},
    "weights-alone": {"shape": (6, 160, 65), "group_size": 32, "activations": "none"},
}
"""(tokens, inputs, outputs)."""


def _make(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    t, k, n = options["shape"]
    groups = k // options["group_size"] if options["group_size"] else 1
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    codes[np.isin(codes, _NO_NUMBERS)] = 0x80  # minus zero, which not every unit has
    inputs = {
        "x": make_normal(rng, (t, k), dtype, scale),
        "codes": torch.from_numpy(codes),
        "scales": torch.from_numpy(rng.uniform(0.5, 2, (n, groups)) * 2.0**-8).float(),
        "bias": make_normal(rng, (n,), dtype, scale),
    }
    inputs["x"][-1] = 0  # a row that rounding must not divide by its largest
    return inputs


def _call(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    weight = QuantizedWeight(
        bits=8,
        group_size=options["group_size"],
        num_inputs=options["shape"][1],
        codes=tensors["codes"],
        scales=tensors["scales"],
        activations=options["activations"],
        encoding="float8_e4m3fn",
    )
    packed = ops.pack_quantized_linear(weight, tensors["bias"], options["dtype"])
    return {"out": ops.linear(tensors["x"], packed)}


def _expect(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    out = layers.float8_linear(
        **arrays, group_size=options["group_size"], activations=options["activations"]
    )
    return {"out": out}


FLOAT8_RECIPE = Recipe(
    variants=_VARIANTS,
    make=_make,
    call=_call,
    expect=_expect,
    hint="Codes are the bits of OCP's e4m3, bias 7, no infinities; AMD's own flavour reads the "
    "same bits as half the number. Are activations rounded to e4m3 as the weight says?",
)
