"""How convolutions and scans are tried; see `recipes` for what a recipe is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.conformance.oracles import recurrence
from quire.conformance.recipes import Array, Inputs, Options, Recipe, make_normal
from quire.core.interface import Ops, Sequences, StateSlots

Tensors = Mapping[str, Tensor]

_STATES = {"states": "float32"}
_STARTS = {"mixed": (0, 1, 6, 7, 20), "one": (0, 9), "decode": (0, 1, 2, 3, 4, 5)}


def _sequences(tensors: Tensors, options: Options) -> Sequences:
    starts = _STARTS[options["starts"]]
    where = next(iter(tensors.values())).device
    slots = None
    if "sources" in tensors:
        slots = StateSlots(sources=tensors["sources"], targets=tensors["targets"])
    return Sequences(
        starts=torch.tensor(starts, dtype=torch.int32, device=where),
        starts_host=list(starts),
        slots=slots,
    )


def _sizes(options: Options) -> tuple[int, int]:
    """(rows, sequences)."""
    starts = _STARTS[options["starts"]]
    return starts[-1], len(starts) - 1


def _states(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    states = make_normal(rng, shape, "float32", 1.0)
    states[0] = 0
    return states


_CONVS: dict[str, Options] = {
    "mixed": {"starts": "mixed", "shape": (48, 4), "bias": True, "activation": "silu"},
    "decode": {"starts": "decode", "shape": (33, 4), "activation": "silu"},
    "plain": {"starts": "one", "shape": (16, 3), "activation": ""},
}


def _conv(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, count = _sizes(options)
    channels, width = options["shape"]
    inputs = {
        "x": make_normal(rng, (rows, channels), dtype, scale),
        "weight": make_normal(rng, (channels, width), dtype, 0.5),
        "states": make_normal(rng, (count, channels, width - 1), dtype, scale),
    }
    bias = {"bias": make_normal(rng, (channels,), dtype, 1.0)} if options.get("bias") else {}
    return inputs | bias


def _call_conv(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    states = tensors["states"]
    out = ops.causal_conv1d(
        tensors["x"],
        tensors["weight"],
        tensors.get("bias"),
        states,
        _sequences(tensors, options),
        activation=options["activation"],
    )
    return {"out": out, "states": states}


def _expect_conv(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    out, states = recurrence.causal_conv1d(
        arrays["x"],
        arrays["weight"],
        arrays.get("bias"),
        arrays["states"],
        _STARTS[options["starts"]],
        activation=options["activation"],
    )
    return {"out": out, "states": states}


def _decays(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(-rng.uniform(0.05, 2.0, shape)).float()


def _times(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(rng.uniform(0.01, 1.0, shape)).float()


_SCANS: dict[str, Options] = {
    "mixed": {"starts": "mixed", "shape": (24, 16), "skip": True},
    "decode": {"starts": "decode", "shape": (33, 8), "skip": True},
    "plain": {"starts": "one", "shape": (8, 16)},
}


def _scan(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, count = _sizes(options)
    channels, size = options["shape"]
    inputs = {
        "x": make_normal(rng, (rows, channels), dtype, scale),
        "dt": _times(rng, (rows, channels)),
        "a": _decays(rng, (channels, size)),
        "b": make_normal(rng, (rows, size), dtype, 1.0),
        "c": make_normal(rng, (rows, size), dtype, 1.0),
        "states": _states(rng, (count, channels, size)),
    }
    return inputs | (
        {"d": make_normal(rng, (channels,), "float32", 1)} if "skip" in options else {}
    )


_SSDS: dict[str, Options] = {
    "mixed": {"starts": "mixed", "shape": (4, 16, 2, 8), "skip": True},
    "decode": {"starts": "decode", "shape": (6, 8, 1, 16), "skip": True},
    "plain": {"starts": "one", "shape": (2, 33, 2, 7)},
}


def _ssd(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, count = _sizes(options)
    heads, channels, groups, size = options["shape"]
    inputs = {
        "x": make_normal(rng, (rows, heads, channels), dtype, scale),
        "dt": _times(rng, (rows, heads)),
        "a": _decays(rng, (heads,)),
        "b": make_normal(rng, (rows, groups, size), dtype, 1.0),
        "c": make_normal(rng, (rows, groups, size), dtype, 1.0),
        "states": _states(rng, (count, heads, channels, size)),
    }
    return inputs | ({"d": make_normal(rng, (heads,), "float32", 1)} if "skip" in options else {})


def _by_token(out: Any) -> Any:
    """[T, ...] as [T, n]: a row is a token, since a head's few numbers may cancel to nothing."""
    return out.reshape(len(out), -1)


def _call_scan(name: str, ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    states = tensors["states"]
    arguments = [tensors[n] for n in ("x", "dt", "a", "b", "c")]
    out = getattr(ops, name)(*arguments, tensors.get("d"), states, _sequences(tensors, options))
    return {"out": _by_token(out), "states": states}


def _expect_scan(name: str, arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    arguments = [arrays[n] for n in ("x", "dt", "a", "b", "c")]
    starts = _STARTS[options["starts"]]
    out, states = getattr(recurrence, name)(*arguments, arrays.get("d"), arrays["states"], starts)
    return {"out": _by_token(out), "states": states}


_DELTAS: dict[str, Options] = {
    "mixed": {"starts": "mixed", "shape": (2, 4, 16, 24)},
    "decode": {"starts": "decode", "shape": (3, 3, 16, 16)},
    "plain": {"starts": "one", "shape": (1, 2, 33, 8)},
}


def _delta(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, count = _sizes(options)
    groups, heads, size, v_size = options["shape"]
    return {
        "q": make_normal(rng, (rows, groups, size), dtype, size**-0.5),
        "k": make_normal(rng, (rows, groups, size), dtype, size**-0.5),
        "v": make_normal(rng, (rows, heads, v_size), dtype, scale),
        "decay": _decays(rng, (rows, heads)),
        "beta": _times(rng, (rows, heads)),
        "states": _states(rng, (count, heads, size, v_size)),
    }


def _call_delta(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
    states = tensors["states"]
    out = ops.gated_delta_rule(
        tensors["q"],
        tensors["k"],
        tensors["v"],
        tensors["decay"],
        tensors["beta"],
        states,
        _sequences(tensors, options),
    )
    return {"out": _by_token(out), "states": states}


def _expect_delta(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    out, states = recurrence.gated_delta_rule(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        arrays["decay"],
        arrays["beta"],
        arrays["states"],
        _STARTS[options["starts"]],
    )
    return {"out": _by_token(out), "states": states}


RECURRENCE_RECIPES: Mapping[str, Recipe] = {
    "causal_conv1d": Recipe(
        variants=_CONVS,
        make=_conv,
        call=_call_conv,
        expect=_expect_conv,
        tolerances={"states": "exact"},
        hint="The state is the last W - 1 inputs, oldest first; sequences do not see each other.",
    ),
    "selective_scan": Recipe(
        variants=_SCANS,
        make=_scan,
        call=lambda ops, t, o: _call_scan("selective_scan", ops, t, o),
        expect=lambda a, o: _expect_scan("selective_scan", a, o),
        dtypes=_STATES,
        hint="The state decays before the new input enters; it is float32 from step to step.",
    ),
    "ssd_scan": Recipe(
        variants=_SSDS,
        make=_ssd,
        call=lambda ops, t, o: _call_scan("ssd_scan", ops, t, o),
        expect=lambda a, o: _expect_scan("ssd_scan", a, o),
        dtypes=_STATES,
        hint="Head m reads group m // (heads / groups); the state is float32 from step to step.",
    ),
    "gated_delta_rule": Recipe(
        variants=_DELTAS,
        make=_delta,
        call=_call_delta,
        expect=_expect_delta,
        dtypes=_STATES,
        hint="Decay first, then recall with the decayed state, then write beta of the difference.",
    ),
}
"""By `OpSpec.name`."""


def in_pages(recipe: Recipe) -> Recipe:
    """The same with states in a page, of which every second block is somebody else's.

    The first sequence starts from zeros, the second goes on in its own block, the others start from
    a block and end in the next.
    """

    def make(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
        inputs = recipe.make(rng, dtype, scale, options)
        states = inputs["states"]
        count = len(states)
        blocks = torch.from_numpy(rng.permutation(4 * count))
        page = make_normal(rng, (4 * count, *states.shape[1:]), "float32", scale).to(states.dtype)
        sources, targets = blocks[:count].clone(), blocks[count : 2 * count].clone()
        targets[1:2] = sources[1:2]
        page[sources] = states
        sources[0] = -1
        return {**inputs, "states": page, "sources": sources, "targets": targets}

    def call(ops: Ops, tensors: Tensors, options: Options) -> dict[str, Tensor]:
        results = recipe.call(ops, tensors, options)
        page, targets = results["states"], tensors["targets"]
        is_other = torch.ones(len(page), dtype=torch.bool, device=page.device)
        is_other[targets] = False
        return {"out": results["out"], "states": page[targets], "others": page[is_other]}

    def expect(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
        page, sources = arrays["states"], arrays["sources"]
        states = np.where(sources.reshape(-1, *[1] * (page.ndim - 1)) < 0, 0, page[sources])
        others = np.delete(page, arrays["targets"], axis=0)
        return {**recipe.expect({**arrays, "states": states}, options), "others": others}

    return replace(
        recipe,
        make=make,
        call=call,
        expect=expect,
        tolerances={**recipe.tolerances, "others": "exact"},
        dtypes={**recipe.dtypes, **({"others": "float32"} if "states" in recipe.dtypes else {})},
        hint="Sequence s starts from states[sources[s]], from zeros where that is negative, and "
        "leaves its last in states[targets[s]]; no other block is written. " + recipe.hint,
    )
