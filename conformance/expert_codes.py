"""Experts whose weights are codes: the recipe of `Ops.experts` after another packing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.conformance.oracles import experts as experts_oracle
from quire.conformance.oracles import layers
from quire.conformance.recipes import Array, Inputs, Options, Recipe, make_normal, make_rounder
from quire.core.interface import Ops, QuantizedExperts, QuantizedWeight

_SIDES = ("gate_up", "down")
_INT8 = {"bits": 8, "group_size": 0, "activations": "token"}
_FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "int8": (_INT8, _INT8),
    "int4": (
        {"bits": 4, "group_size": 32, "activations": "group"},
        {"bits": 4, "group_size": 16, "activations": "group"},
    ),
    "int4-beside-int8": ({"bits": 4, "group_size": 16, "activations": "group"}, _INT8),
    "weights-alone": (
        {"bits": 4, "group_size": 32, "activations": "none"},
        {"bits": 8, "group_size": 0, "activations": "none"},
    ),
}
"""Of gate and up, and of down."""
_BY_TOKEN = {"bits": 8, "group_size": 0, "activations": "token", "encoding": "float8_e4m3fn"}
_BLOCKS: dict[str, Any] = {**_BY_TOKEN, "group_size": 32, "activations": "group"}
_FLOAT8_FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rows": (_BY_TOKEN, _BY_TOKEN),
    "blocks": (_BLOCKS, {**_BLOCKS, "group_size": 16}),
    "weights-alone": ({**_BLOCKS, "activations": "none"}, {**_BY_TOKEN, "activations": "none"}),
}


def in_codes(recipe: Recipe) -> Recipe:
    """The experts of `recipe` with weights in 4 and 8 bits, in forms that may differ."""
    return _in_forms(recipe, _FORMS)


def in_float8(recipe: Recipe) -> Recipe:
    """The experts of `recipe` with weights in 8-bit floats, scaled by rows and by groups."""
    return _in_forms(recipe, _FLOAT8_FORMS)


def _in_forms(
    recipe: Recipe, all_forms: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
) -> Recipe:
    base = {"shape": (7, 5, 2, 64, 32), "kind": "silu"}
    return replace(
        recipe,
        variants={name: {**base, "forms": forms} for name, forms in all_forms.items()},
        make=_make,
        call=_call,
        expect=_expect,
        hint="The inputs of both products are rounded as their weights say, those of the second "
        "after the activation was rounded to the dtype.",
    )


def _make(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    tokens, count, chosen, hidden, inner = options["shape"]
    order = np.argsort(rng.random((tokens, count)), axis=-1)[:, :chosen]
    inputs = {
        "x": make_normal(rng, (tokens, hidden), dtype, scale),
        "weights": torch.from_numpy(rng.uniform(0.1, 1, (tokens, chosen))).float(),
        "expert_ids": torch.from_numpy(order.copy()),
    }
    for side, form, (n, k) in zip(
        _SIDES, options["forms"], ((2 * inner, hidden), (hidden, inner)), strict=True
    ):
        groups = k // form["group_size"] if form["group_size"] else 1
        codes = rng.integers(0, 256, (count, n, k * form["bits"] // 8), dtype=np.uint8)
        most = 2.0 ** form["bits"]
        if "encoding" in form:
            codes[codes & 0x7F == 0x7F] = 0x80  # a zero with a sign instead of what is no number
            most = 448.0
        scales = rng.uniform(0.5, 2, (count, n, groups)) / most * k**-0.5
        inputs[f"{side}_codes"] = torch.from_numpy(codes)
        inputs[f"{side}_scales"] = torch.from_numpy(scales).bfloat16()
    return inputs


def _call(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    sides = [
        [
            QuantizedWeight(
                **form, num_inputs=codes.shape[1] * 8 // form["bits"], codes=codes, scales=scales
            )
            for codes, scales in zip(
                tensors[f"{side}_codes"], tensors[f"{side}_scales"], strict=True
            )
        ]
        for side, form in zip(_SIDES, options["forms"], strict=True)
    ]
    codes = QuantizedExperts(gate_up=sides[0], down=sides[1], activation=options["kind"])
    packed = ops.pack_quantized_experts(codes, options["dtype"])
    return {"out": ops.experts(tensors["x"], packed, tensors["weights"], tensors["expert_ids"])}


def _expect(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    # In float32 it is the baseline, which rounds where an honest device does.
    is_truth = arrays["x"].dtype == np.float64
    rounded = (lambda x: x) if is_truth else make_rounder(options["dtype"])
    activation = experts_oracle.gated(options["kind"])

    def multiplied(side: int, expert: int, row: Array) -> Array:
        codes, scales = (arrays[f"{_SIDES[side]}_{part}"][expert] for part in ("codes", "scales"))
        how = dict(options["forms"][side])
        if how.pop("encoding", ""):
            how.pop("bits")
            none = np.zeros(len(codes), row.dtype)
            return np.asarray(layers.float8_linear(row[None], codes, scales, none, **how)[0])
        product = layers.quantized_linear(row[None], codes, scales, None, None, **how)
        return np.asarray(product[0])

    out = np.zeros_like(arrays["x"])
    for token, row in enumerate(arrays["x"]):
        for share, expert in zip(
            arrays["weights"][token], arrays["expert_ids"][token], strict=True
        ):
            inner = rounded(activation(multiplied(0, expert, row)))
            out[token] += share * multiplied(1, expert, inner)
    return {"out": out}
