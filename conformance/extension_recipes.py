"""How the operators of extensions are tried; see `recipes` for what a recipe is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from quire.conformance.oracles import experts as experts_oracle
from quire.conformance.oracles import layers
from quire.conformance.recipes import Array, Inputs, Options, Recipe, make_normal, make_rounder
from quire.conformance.recurrence_recipes import RECURRENCE_RECIPES
from quire.core.interface import ExpertWeights, Ops, QuantizedWeight, RoutingSpec

Tensors = Mapping[str, Tensor]

# --- latent attention -----------------------------------------------------------------------------

_HEADS: dict[str, Options] = {
    "up": {"shape": (5, 4, 16, 32)},
    "down": {"shape": (1, 3, 33, 7)},
    "strided": {"shape": (7, 2, 24, 64), "is_strided": True},
}


def _heads(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    tokens, heads, num_inputs, num_outputs = options["shape"]
    width = num_inputs + 8 if options.get("is_strided") else num_inputs
    return {
        "x": make_normal(rng, (tokens, heads, width), dtype, scale),
        "weight": make_normal(rng, (heads, num_outputs, num_inputs), dtype, num_inputs**-0.5),
    }


def _call_heads(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    x = tensors["x"][..., : options["shape"][2]]
    return {"out": ops.head_linear(x, tensors["weight"])}


def _expect_heads(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    x = arrays["x"][..., : options["shape"][2]]
    return {"out": layers.head_linear(x, arrays["weight"])}


# --- adapters -------------------------------------------------------------------------------------

_LORAS: dict[str, Options] = {
    "mixed": {"shape": (9, 3, 8, 64, 48), "ids": (0, -1, 2, 2, 1, -1, 0, 1, 2)},
    "one": {"shape": (4, 1, 16, 33, 65), "ids": (0, 0, 0, 0)},
    "none": {"shape": (3, 2, 4, 32, 32), "ids": (-1, -1, -1)},
    "decode": {"shape": (5, 5, 8, 96, 32), "ids": (4, 3, 2, 1, 0)},
}
"""(tokens, adapters, rank, inputs, outputs), and each token's adapter."""


def _lora(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    tokens, adapters, rank, num_inputs, num_outputs = options["shape"]
    return {
        "out": make_normal(rng, (tokens, num_outputs), dtype, scale),
        "x": make_normal(rng, (tokens, num_inputs), dtype, scale),
        "down": make_normal(rng, (adapters, rank, num_inputs), dtype, num_inputs**-0.5),
        "up": make_normal(rng, (adapters, num_outputs, rank), dtype, rank**-0.5),
        "adapter_ids": torch.tensor(options["ids"]),
    }


def _call_lora(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    ops.add_lora(**tensors)
    return {"out": tensors["out"]}


def _expect_lora(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    is_truth = arrays["x"].dtype == np.float64
    rounded = (lambda x: x) if is_truth else make_rounder(options["dtype"])
    return {"out": layers.add_lora(**arrays, rounded=rounded)}


# --- experts --------------------------------------------------------------------------------------

_ROUTES: dict[str, Options] = {
    "softmax": {"spec": RoutingSpec(num_experts=8, num_chosen=2)},
    "plain": {"spec": RoutingSpec(num_experts=33, num_chosen=4, is_renormalised=False)},
    "grouped": {
        "spec": RoutingSpec(
            num_experts=16,
            num_chosen=3,
            is_renormalised=False,
            scale=2.5,
            num_groups=4,
            num_kept_groups=2,
        )
    },
    "corrected": {
        "spec": RoutingSpec(
            num_experts=16,
            num_chosen=4,
            score="sigmoid",
            scale=1.5,
            num_groups=4,
            num_kept_groups=2,
            group_score="top2",
        ),
        "bias": True,
    },
}


def _route(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    count = options["spec"].num_experts
    inputs = {"logits": make_normal(rng, (9, count), dtype, min(scale, 4.0))}
    # Ties, within a row and between groups.
    inputs["logits"][0] = 0.5
    inputs["logits"][1, count // 2] = inputs["logits"][1, 0]
    if options.get("bias"):
        inputs["correction_bias"] = make_normal(rng, (count,), dtype, 0.3)
    return inputs


def _call_route(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    logits = tensors["logits"]
    weights, ids = ops.route_experts(logits, options["spec"], tensors.get("correction_bias"))
    # The order of a token's experts is free: compare by expert.
    return {"weights": torch.zeros_like(logits).scatter(-1, ids, weights.to(logits.dtype))}


def _expect_route(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    bias = arrays.get("correction_bias")
    return {"weights": experts_oracle.route(arrays["logits"], options["spec"], bias)}


_EXPERTS: dict[str, Options] = {
    "silu": {"shape": (7, 6, 2, 64, 32), "kind": "silu"},
    "one": {"shape": (3, 4, 1, 33, 17), "kind": "gelu", "weighs_input": True},
    "biased": {"shape": (5, 4, 3, 48, 24), "kind": "clamped_swiglu", "bias": True},
    "crowded": {"shape": (40, 3, 2, 32, 32), "kind": "silu"},
}


def _experts(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    tokens, count, chosen, hidden, inner = options["shape"]
    order = np.argsort(rng.random((tokens, count)), axis=-1)[:, :chosen]
    inputs = {
        "x": make_normal(rng, (tokens, hidden), dtype, scale),
        "gate_up": make_normal(rng, (count, 2 * inner, hidden), dtype, hidden**-0.5),
        "down": make_normal(rng, (count, hidden, inner), dtype, inner**-0.5),
        "weights": torch.from_numpy(rng.uniform(0.1, 1, (tokens, chosen))).float(),
        "expert_ids": torch.from_numpy(order.copy()),
    }
    if options.get("bias"):
        inputs["gate_up_bias"] = make_normal(rng, (count, 2 * inner), dtype, 1.0)
        inputs["down_bias"] = make_normal(rng, (count, hidden), dtype, 1.0)
    return inputs


def _call_experts(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    packed = ops.pack_experts(
        ExpertWeights(
            gate_up=tensors["gate_up"],
            down=tensors["down"],
            gate_up_bias=tensors.get("gate_up_bias"),
            down_bias=tensors.get("down_bias"),
            activation=options["kind"],
        )
    )
    out = ops.experts(
        tensors["x"],
        packed,
        tensors["weights"],
        tensors["expert_ids"],
        weighs_input=bool(options.get("weighs_input")),
    )
    return {"out": out}


def _expect_experts(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    # In float32 it is the baseline, which rounds where an honest device does.
    is_truth = arrays["x"].dtype == np.float64
    rounded = (lambda x: x) if is_truth else make_rounder(options["dtype"])
    biases = (arrays["gate_up_bias"], arrays["down_bias"]) if options.get("bias") else None
    out = experts_oracle.experts(
        arrays["x"],
        arrays["gate_up"],
        arrays["down"],
        biases,
        arrays["weights"],
        arrays["expert_ids"],
        experts_oracle.gated(options["kind"]),
        rounded,
        weighs_input=bool(options.get("weighs_input")),
    )
    return {"out": out}


# --- quantization ---------------------------------------------------------------------------------

_QUANTIZED: dict[str, Options] = {
    "int8": {"shape": (5, 96, 33), "bits": 8, "group_size": 0, "activations": "token"},
    "int8-grouped": {"shape": (3, 128, 20), "bits": 8, "group_size": 32, "activations": "none"},
    "int4": {"shape": (6, 256, 48), "bits": 4, "group_size": 64, "activations": "group"},
    "int4-zeros": {
        "shape": (2, 64, 65), "bits": 4, "group_size": 32, "activations": "none", "zeros": True,
    },
}  # fmt: skip


def _quantized(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    t, k, n = options["shape"]
    bits, size = options["bits"], options["group_size"]
    groups = k // size if size else 1
    inputs = {
        "x": make_normal(rng, (t, k), dtype, scale),
        "codes": torch.from_numpy(rng.integers(0, 256, (n, k * bits // 8), dtype=np.uint8)),
        "scales": torch.from_numpy(rng.uniform(0.5, 2, (n, groups)) * 2.0**-bits).bfloat16(),
        "bias": make_normal(rng, (n,), dtype, scale),
    }
    inputs["x"][-1] = 0  # a row that rounding must not divide by its largest
    if options.get("zeros"):
        zeros = rng.integers(0, 2**bits, (n, groups), dtype=np.uint8)
        inputs["zeros"] = torch.from_numpy(zeros)
    return inputs


def _call_quantized(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    weight = QuantizedWeight(
        bits=options["bits"],
        group_size=options["group_size"],
        num_inputs=options["shape"][1],
        codes=tensors["codes"],
        scales=tensors["scales"],
        zeros=tensors.get("zeros"),
        activations=options["activations"],
    )
    packed = ops.pack_quantized_linear(weight, tensors["bias"], options["dtype"])
    return {"out": ops.linear(tensors["x"], packed)}


def _expect_quantized(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    how = {name: options[name] for name in ("bits", "group_size", "activations")}
    inputs = (arrays["x"], arrays["codes"], arrays["scales"], arrays.get("zeros"), arrays["bias"])
    return {"out": layers.quantized_linear(*inputs, **how)}


EXTENSION_RECIPES: Mapping[str, Recipe] = {
    **RECURRENCE_RECIPES,
    "add_lora": Recipe(
        variants=_LORAS,
        make=_lora,
        call=_call_lora,
        expect=_expect_lora,
        hint="Each token has its own adapter; -1 has none, and its row keeps its bits.",
    ),
    "head_linear": Recipe(
        variants=_HEADS,
        make=_heads,
        call=_call_heads,
        expect=_expect_heads,
        hint="Head m has weight[m] of its own; x may be a strided view; it accumulates in float32.",
    ),
    "pack_quantized_linear": Recipe(
        variants=_QUANTIZED,
        make=_quantized,
        call=_call_quantized,
        expect=_expect_quantized,
        hint="Codes are unsigned; input 2j lies in the low half of byte j; are activations rounded "
        "as the weight says, with one scale a row or a group?",
    ),
    "route_experts": Recipe(
        variants=_ROUTES,
        make=_route,
        call=_call_route,
        expect=_expect_route,
        hint="The bias chooses and does not weigh; ties go to the lowest id; the scale comes last.",
    ),
    "experts": Recipe(
        variants=_EXPERTS,
        make=_experts,
        call=_call_experts,
        expect=_expect_experts,
        hint="Every token's experts, each with its own weight; gate rows come before the others.",
    ),
}
"""By `OpSpec.name`."""
