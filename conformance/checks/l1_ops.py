"""Level 1: every operator of `OP_SPECS` that has a recipe, against its formula and its manners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.conformance.buffers import Guarded, check_all, guard_all, same_bits
from quire.conformance.cases import check
from quire.conformance.extension_recipes import EXTENSION_RECIPES
from quire.conformance.recipes import RECIPES, SCALES, Inputs, Options, Recipe, arrays_of
from quire.conformance.trial import Trial
from quire.core.interface import OP_SPECS, Capabilities, OpSpec

_RECIPES = {**RECIPES, **EXTENSION_RECIPES}
_SPECS = {spec.name: spec for spec in OP_SPECS if spec.name in _RECIPES}
_REPEATABLE = ("run_to_run", "batch_invariant", "invariant")
_BY_ROW = ("linear", "rms_norm", "gated_activation")
"""Operators that work row by row on `x`, tried alone and in a batch."""


def numeric_cases(extension: str = "") -> dict[str, dict[str, Any]]:
    """Every operator of the levels, or of an extension, in every dtype and over every data."""
    return {
        f"{spec.name}-{variant}-{dtype}-{scale}": {
            "op": spec.name,
            "variant": variant,
            "dtype": dtype,
            "scale": scale,
        }
        for spec in _SPECS.values()
        if spec.extension == extension
        for variant in _RECIPES[spec.name].variants
        for dtype in spec.dtypes
        for scale in SCALES
    }


def op_cases(extension: str = "", ops: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Every operator of the levels, or of an extension, in every dtype."""
    return {
        f"{spec.name}-{dtype}": {"op": spec.name, "dtype": dtype}
        for spec in _SPECS.values()
        if spec.extension == extension and (not ops or spec.name in ops)
        for dtype in spec.dtypes
    }


class _Call:
    """One call of an operator on guarded buffers, and what it gave."""

    def __init__(
        self,
        trial: Trial,
        spec: OpSpec,
        inputs: Inputs,
        options: Options,
        recipe: Recipe | None = None,
    ) -> None:
        device, recipe = trial.device, recipe or _RECIPES[spec.name]
        self.guarded: dict[str, Guarded] = guard_all(inputs, str(device.torch_device))
        views = {name: buffer.view for name, buffer in self.guarded.items()}
        self.results: dict[str, Tensor] = recipe.call(device.ops(), views, options)
        device.synchronize()
        trial.provider = device.ops().provider(spec.name)


def _prepare(
    trial: Trial, op: str, dtype: str, *, variant: str = "", scale: str = "normal"
) -> tuple[OpSpec, Recipe, Options, Inputs]:
    recipe = _RECIPES[op]
    options = {**recipe.variants[variant or next(iter(recipe.variants))], "dtype": dtype}
    return _SPECS[op], recipe, options, recipe.make(trial.rng, dtype, SCALES[scale], options)


def _measure(
    trial: Trial,
    call: _Call,
    inputs: Inputs,
    spec: OpSpec,
    options: Options,
    what: str,
    recipe: Recipe | None = None,
) -> None:
    recipe = recipe or _RECIPES[spec.name]
    truth = recipe.expect(arrays_of(inputs, np.float64), options)
    base = recipe.expect(arrays_of(inputs, np.float32), options)
    for name, result in call.results.items():
        trial.measure(
            f"{spec.name}: {what} ({name})",
            result,
            truth[name],
            base[name],
            tolerance=recipe.tolerances.get(name, spec.tolerance),
            hint=recipe.hint,
        )


def measure_otherwise(
    trial: Trial, op: str, dtype: str, change: Callable[[Recipe], Recipe], what: str
) -> None:
    """All variants of an operator's recipe after a change, against its oracle."""
    recipe = change(_RECIPES[op])
    for variant in recipe.variants:
        options = {**recipe.variants[variant], "dtype": dtype}
        inputs = recipe.make(trial.rng, dtype, SCALES["normal"], options)
        call = _Call(trial, _SPECS[op], inputs, options, recipe)
        _measure(trial, call, inputs, _SPECS[op], options, f"{what}, {variant}", recipe)


@check(level=1, op="", over=numeric_cases())
def numerics(trial: Trial, *, op: str, variant: str, dtype: str, scale: str) -> None:
    """The result is the formula's, as near as honest rounding in this dtype allows."""
    spec, _, options, inputs = _prepare(trial, op, dtype, variant=variant, scale=scale)
    call = _Call(trial, spec, inputs, options)
    where = torch.device(str(trial.device.torch_device)).type
    for name, result in call.results.items():
        trial.require(
            result.device.type == where,
            f"{op}: {name} lies on {result.device}, not on the device ({where}): the operator runs "
            "somewhere else",
        )
        wanted = _RECIPES[op].dtypes.get(name, dtype)
        is_typed = not result.dtype.is_floating_point or str(result.dtype) == f"torch.{wanted}"
        trial.require(is_typed, f"{op}: {name} is {result.dtype} and should be {wanted}")
    _measure(trial, call, inputs, spec, options, "the result")


@check(level=1, op="", over=op_cases())
def purity(trial: Trial, *, op: str, dtype: str) -> None:
    """Only what the specification lists under `writes` is written, and nothing around it."""
    for variant in _RECIPES[op].variants:
        spec, _, options, inputs = _prepare(trial, op, dtype, variant=variant)
        call = _Call(trial, spec, inputs, options)
        writes = {*spec.writes, "qkv"} if op == "rotary" else set(spec.writes)
        check_all(call.guarded, writes=writes)


@check(level=1, op="", over=op_cases())
def new_data(trial: Trial, *, op: str, dtype: str) -> None:
    """The same shapes with new data give the new answer, three times over."""
    for number in range(3):
        spec, _, options, inputs = _prepare(trial, op, dtype)
        call = _Call(trial, spec, inputs, options)
        _measure(
            trial,
            call,
            inputs,
            spec,
            options,
            f"call number {number + 1} with the same shapes and new data; is a result, a graph or "
            "a buffer of an earlier call used again?",
        )


def _needs_repeatable(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if claims.determinism in _REPEATABLE:
        return ""
    return f"determinism {claims.determinism!r} claims no repeatability"


@check(level=1, op="", over=op_cases(), needs=_needs_repeatable)
def repeats(trial: Trial, *, op: str, dtype: str) -> None:
    """A device that claims determinism gives the same bits for the same inputs."""
    spec, _, options, inputs = _prepare(
        trial, op, dtype, variant=list(_RECIPES[op].variants)[-1], scale="large"
    )
    first = _Call(trial, spec, inputs, options).results
    for _ in range(3):
        again = _Call(trial, spec, inputs, options).results
        for name, result in again.items():
            trial.require(
                same_bits(result, first[name]),
                f"{op}: the same inputs gave other bits in {name}; the device claims determinism "
                f"{trial.capabilities.determinism!r}",
            )


def _needs_batch_invariant(claims: Capabilities, arguments: Mapping[str, Any]) -> str:
    if claims.determinism in {"batch_invariant", "invariant"}:
        return ""
    return f"determinism {claims.determinism!r} claims no independence of the batch"


@check(level=1, op="", over=op_cases(ops=_BY_ROW), needs=_needs_batch_invariant)
def alone_equals_batch(trial: Trial, *, op: str, dtype: str) -> None:
    """A row has the same bits alone and among others, where that is claimed."""
    spec, _, options, inputs = _prepare(trial, op, dtype, variant=list(_RECIPES[op].variants)[-1])
    whole = _Call(trial, spec, inputs, options).results["out"]
    for row in range(len(inputs["x"])):
        one = {**inputs, "x": inputs["x"][row : row + 1]}
        alone = _Call(trial, spec, one, options).results["out"]
        trial.require(
            same_bits(alone[0], whole[row]),
            f"{op}: row {row} has other bits alone than in a batch of {len(inputs['x'])}; the "
            f"device claims determinism {trial.capabilities.determinism!r}",
        )
