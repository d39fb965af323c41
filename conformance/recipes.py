"""How each operator is tried: its inputs, the call, and what the oracle says of the same inputs.

One recipe for each row of `OP_SPECS` but `sample` and `paged_attention`, which have checks of their
own. Inputs are rounded to the working dtype first, so device and oracle see the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quire.conformance.oracles import ORACLES
from quire.core.interface import Ops

Array = npt.NDArray[Any]
Inputs = dict[str, Tensor]
Options = Mapping[str, Any]
SCALES = {"normal": 1.0, "large": 30.0, "small": 0.004}
"""Data: where squares overflow half precision, and where an epsilon decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One operator."""

    variants: Mapping[str, Options]
    make: Callable[[np.random.Generator, str, float, Options], Inputs]
    """(rng, dtype, scale, options): the inputs, on the host."""
    call: Callable[[Ops, Mapping[str, Tensor], Options], dict[str, Tensor]]
    """Runs the operator on the device; its results and what it wrote, by name."""
    expect: Callable[[Mapping[str, Array], Options], dict[str, Array]]
    """The same by the oracle, in the dtype of the arrays."""
    tolerances: Mapping[str, str] = field(default_factory=dict)
    """Of results that are not of the operator's own class."""
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Of results that have a dtype of their own, whatever the inputs have."""
    hint: str = ""
    """What a stranger should look at first when the numbers are wrong."""


def arrays_of(inputs: Mapping[str, Tensor], width: type[np.floating[Any]]) -> dict[str, Array]:
    """Host tensors as numpy arrays; floats in the precision `width`."""
    return {
        name: tensor.double().numpy().astype(width)
        if tensor.is_floating_point()
        else tensor.numpy()
        for name, tensor in inputs.items()
    }


def make_normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float
) -> Tensor:
    """Normal numbers of this standard deviation, rounded to the dtype."""
    drawn = torch.from_numpy(rng.standard_normal(shape) * scale)
    return drawn.to(getattr(torch, dtype))


def _integers(rng: np.random.Generator, limit: int, count: int) -> Tensor:
    drawn = rng.integers(0, limit, count)
    drawn[:1], drawn[-1:] = 0, limit - 1
    return torch.from_numpy(drawn)


def make_rounder(dtype: str) -> Callable[[Array], Array]:
    """Rounds arrays to a dtype, as an operator does that writes an intermediate result."""

    def rounded(x: Array) -> Array:
        near = torch.from_numpy(np.asarray(x, dtype=np.float64)).to(getattr(torch, dtype))
        return np.asarray(near.double().numpy().astype(x.dtype))

    return rounded


# --- layers ---------------------------------------------------------------------------------------


def _embedding(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, width = options["table"]
    return {
        "token_ids": _integers(rng, rows, options["count"]),
        "weight": make_normal(rng, (rows, width), dtype, scale),
    }


def _linear(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    t, k, n = options["shape"]
    inputs = {
        "x": make_normal(rng, (t, k), dtype, scale),
        "weight": make_normal(rng, (n, k), dtype, k**-0.5),
    }
    return inputs | ({"bias": make_normal(rng, (n,), dtype, scale)} if options["bias"] else {})


def _call_linear(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    packed = ops.pack_linear(tensors["weight"], tensors.get("bias"))
    return {"out": ops.linear(tensors["x"], packed)}


def _norm(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    shape = options["shape"]
    inputs = {
        "x": make_normal(rng, shape, dtype, scale),
        "weight": make_normal(rng, shape[-1:], dtype, 1.0),
    }
    if options.get("adds"):
        inputs["residual"] = make_normal(rng, shape, dtype, scale)
    return inputs


def _call_add_norm(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    residual = tensors["residual"]
    out = ops.add_rms_norm(tensors["x"], residual, tensors["weight"], options["eps"])
    return {"out": out, "residual": residual}


def _expect_add_norm(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    out, total = ORACLES["layers.add_rms_norm"](
        arrays["x"],
        arrays["residual"],
        arrays["weight"],
        options["eps"],
        make_rounder(options["dtype"]),
    )
    return {"out": out, "residual": total}


def _rotary(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    num_tokens, q_heads, k_heads, size, pairs = options["shape"]
    angles = rng.uniform(0, 2 * np.pi, (num_tokens, pairs))
    tables = {
        "cos": torch.from_numpy(np.cos(angles)).float(),
        "sin": torch.from_numpy(np.sin(angles)).float(),
    }
    if options.get("is_strided"):
        shape = (num_tokens, (q_heads + 2 * k_heads) * size)
        return {"qkv": make_normal(rng, shape, dtype, scale)} | tables
    q = make_normal(rng, (num_tokens, q_heads, size), dtype, scale)
    return {"q": q, "k": make_normal(rng, (num_tokens, k_heads, size), dtype, scale)} | tables


def _call_rotary(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    q, k, written = _heads(tensors, options)
    ops.rotary(
        q, k, tensors["cos"], tensors["sin"], is_interleaved=bool(options.get("is_interleaved"))
    )
    return dict.fromkeys(written, q) if not written else {n: tensors[n] for n in written}


def _heads(
    tensors: Mapping[str, Tensor], options: Options
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    if "qkv" not in tensors:
        return tensors["q"], tensors["k"], ("q", "k")
    _, q_heads, k_heads, size, _ = options["shape"]
    widths = [q_heads * size, k_heads * size, k_heads * size]
    parts = torch.split(tensors["qkv"], widths, dim=-1)
    q, k = (part.view(len(part), -1, size) for part in parts[:2])
    return q, k, ("qkv",)


def _expect_rotary(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    rotary = ORACLES["layers.rotary"]
    angles = (arrays["cos"], arrays["sin"])
    is_interleaved = bool(options.get("is_interleaved"))
    if "qkv" not in arrays:
        return {
            name: rotary(arrays[name], *angles, is_interleaved=is_interleaved)
            for name in ("q", "k")
        }
    num_tokens, q_heads, k_heads, size, _ = options["shape"]
    heads = arrays["qkv"].reshape(num_tokens, -1, size)
    turned = rotary(heads[:, : q_heads + k_heads], *angles, is_interleaved=is_interleaved)
    whole = np.concatenate((turned, heads[:, q_heads + k_heads :]), axis=1)
    return {"qkv": whole.reshape(num_tokens, -1)}


def _call_soft_cap(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    ops.soft_cap(tensors["x"], options["cap"])
    return {"x": tensors["x"]}


# --- logits ---------------------------------------------------------------------------------------


def _entries(rng: np.random.Generator, rows: int, vocabulary: int, each: int) -> Inputs:
    tokens = [rng.permutation(vocabulary)[:each] for _ in range(rows)]
    return {
        "rows": torch.arange(rows).repeat_interleave(each),
        "token_ids": torch.from_numpy(np.concatenate(tokens)),
    }


def _penalties(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, vocabulary, each = options["shape"]
    settings = rng.uniform((1.1, 0.2, 0.3), (1.8, 1.2, 1.5), (rows, 3))
    return {
        "logits": make_normal(rng, (rows, vocabulary), dtype, 4 * scale),
        **_entries(rng, rows, vocabulary, each),
        "output_counts": torch.from_numpy(rng.integers(0, 4, rows * each)).float(),
        "settings": torch.from_numpy(settings).float(),
    }


def _call_penalties(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    ops.apply_penalties(**tensors)
    return {"logits": tensors["logits"]}


def _bias(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, vocabulary, each = options["shape"]
    bias = make_normal(rng, (rows * each,), dtype, 3.0)
    bias[1] = float("-inf")
    return {
        "logits": make_normal(rng, (rows, vocabulary), dtype, 4 * scale),
        **_entries(rng, rows, vocabulary, each),
        "bias": bias,
    }


def _call_bias(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    ops.add_bias(**tensors)
    return {"logits": tensors["logits"]}


def _keep(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, vocabulary, each = options["shape"]
    kept = rng.permutation(rows)[: rows - 1]
    entries = _entries(rng, len(kept), vocabulary, each)
    return {
        "logits": make_normal(rng, (rows, vocabulary), dtype, 4 * scale),
        "rows": torch.from_numpy(kept),
        "row_of_entry": torch.from_numpy(kept)[entries["rows"]],
        "token_ids": entries["token_ids"],
    }


def _call_keep(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    ops.keep_only(**tensors)
    return {"logits": tensors["logits"]}


def _mask(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, vocabulary, _ = options["shape"]
    masked = rng.permutation(rows)[: rows - 1]
    words = rng.integers(0, 1 << 32, (len(masked), -(-vocabulary // 32)), dtype=np.uint32)
    return {
        "logits": make_normal(rng, (rows, vocabulary), dtype, 4 * scale),
        "rows": torch.from_numpy(masked),
        "mask": torch.from_numpy(words.view(np.int32)),
    }


def _call_mask(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    ops.apply_token_mask(**tensors)
    return {"logits": tensors["logits"]}


def _logprobs(rng: np.random.Generator, dtype: str, scale: float, options: Options) -> Inputs:
    rows, vocabulary, _ = options["shape"]
    logits = make_normal(rng, (rows, vocabulary), dtype, 4 * scale)
    logits[:, vocabulary // 3] = logits[:, vocabulary // 2]
    token_ids = _integers(rng, vocabulary, rows)
    token_ids[1] = vocabulary // 2  # one that ties
    return {"logits": logits, "token_ids": token_ids}


def _call_logprobs(ops: Ops, tensors: Mapping[str, Tensor], options: Options) -> dict[str, Tensor]:
    result = ops.logprobs(tensors["logits"], tensors["token_ids"], options["num_top"])
    names = ("selected", "ranks", "top_ids", "top_logprobs")
    return {name: getattr(result, name) for name in names}


def _expect_logprobs(arrays: Mapping[str, Array], options: Options) -> dict[str, Array]:
    results = ORACLES["logits.logprobs"](arrays["logits"], arrays["token_ids"], options["num_top"])
    return dict(zip(("selected", "ranks", "top_ids", "top_logprobs"), results, strict=True))


_LOGITS = {
    "small": {"shape": (3, 50, 5), "num_top": 4},
    "wide": {"shape": (4, 1000, 40), "num_top": 20},
}
_NORMS: Mapping[str, Options] = {
    "h64": {"shape": (7, 64), "eps": 1e-5},
    "h33": {"shape": (3, 33), "eps": 1e-6},
    "h1024": {"shape": (2, 1024), "eps": 1e-5},
}

RECIPES: Mapping[str, Recipe] = {
    "embedding": Recipe(
        variants={
            "h64": {"table": (97, 64), "count": 20},
            "h33": {"table": (5, 33), "count": 3},
        },
        make=_embedding,
        call=lambda ops, t, o: {"out": ops.embedding(t["token_ids"], t["weight"])},
        expect=lambda a, o: {"out": ORACLES["layers.embedding"](a["token_ids"], a["weight"])},
        hint="Row token_ids[t] must be copied bit for bit.",
    ),
    "linear": Recipe(
        variants={
            "k64": {"shape": (1, 64, 48), "bias": False},
            "k96-bias": {"shape": (7, 96, 33), "bias": True},
            "k1024": {"shape": (5, 1024, 64), "bias": False},
        },
        make=_linear,
        call=_call_linear,
        expect=lambda a, o: {"out": ORACLES["layers.linear"](a["x"], a["weight"], a.get("bias"))},
        hint="Does it accumulate in float32, and add the bias before rounding?",
    ),
    "rms_norm": Recipe(
        variants={**_NORMS, "heads": {"shape": (3, 4, 32), "eps": 1e-6}},
        make=_norm,
        call=lambda ops, t, o: {"out": ops.rms_norm(t["x"], t["weight"], o["eps"])},
        expect=lambda a, o: {"out": ORACLES["layers.rms_norm"](a["x"], a["weight"], o["eps"])},
        hint="Is eps added inside the root, is the mean over the last dimension, in float32?",
    ),
    "add_rms_norm": Recipe(
        variants={name: {**options, "adds": True} for name, options in _NORMS.items()},
        make=_norm,
        call=_call_add_norm,
        expect=_expect_add_norm,
        tolerances={"residual": "exact"},
        hint="The sum goes into residual, rounded to its dtype, and that is what is normalised.",
    ),
    "gated_activation": Recipe(
        variants={
            f"{kind}-i{width}": {"kind": kind, "width": width}
            for kind in ("silu", "gelu_tanh", "gelu")
            for width in (48, 33)
        },
        make=lambda rng, dtype, scale, o: {
            "x": make_normal(rng, (5, 2 * o["width"]), dtype, scale)
        },
        call=lambda ops, t, o: {"out": ops.gated_activation(t["x"], o["kind"])},
        expect=lambda a, o: {"out": ORACLES["layers.gated_activation"](a["x"], o["kind"])},
        hint="The first half is activated, the second multiplies; is it the right form of GELU?",
    ),
    "rotary": Recipe(
        variants={
            "half": {"shape": (5, 4, 2, 32, 16)},
            "interleaved": {"shape": (5, 4, 2, 32, 16), "is_interleaved": True},
            "partial": {"shape": (4, 2, 1, 20, 6)},
            "strided": {"shape": (6, 4, 2, 16, 8), "is_strided": True},
        },
        make=_rotary,
        call=_call_rotary,
        expect=_expect_rotary,
        hint="Pairs are (i, i + F), or (2i, 2i + 1) where is_interleaved; features past 2F stay.",
    ),
    "soft_cap": Recipe(
        variants={"cap30": {"cap": 30.0}, "cap2": {"cap": 2.0}},
        make=lambda rng, dtype, scale, o: {"x": make_normal(rng, (4, 65), dtype, 3 * scale)},
        call=_call_soft_cap,
        expect=lambda a, o: {"x": ORACLES["layers.soft_cap"](a["x"], o["cap"])},
        hint="cap * tanh(x / cap), in place.",
    ),
    "apply_penalties": Recipe(
        variants=_LOGITS,
        make=_penalties,
        call=_call_penalties,
        expect=lambda a, o: {"logits": ORACLES["logits.apply_penalties"](**a)},
        hint="Once an entry: repetition first, then frequency * count, then presence if count > 0.",
    ),
    "add_bias": Recipe(
        variants=_LOGITS,
        make=_bias,
        call=_call_bias,
        expect=lambda a, o: {"logits": ORACLES["logits.add_bias"](**a)},
        hint="-inf forbids a token; other entries stay as they were.",
    ),
    "keep_only": Recipe(
        variants=_LOGITS,
        make=_keep,
        call=_call_keep,
        expect=lambda a, o: {"logits": ORACLES["logits.keep_only"](**a)},
        hint="-inf everywhere in the listed rows but at the entries; other rows stay.",
    ),
    "apply_token_mask": Recipe(
        variants=_LOGITS,
        make=_mask,
        call=_call_mask,
        expect=lambda a, o: {"logits": ORACLES["logits.apply_token_mask"](**a)},
        hint="Bit i % 32 of word i // 32 stands for token i; the sign bit is a bit like others.",
    ),
    "logprobs": Recipe(
        variants=_LOGITS,
        make=_logprobs,
        call=_call_logprobs,
        expect=_expect_logprobs,
        tolerances={"ranks": "exact", "top_ids": "exact"},
        hint="log_softmax of the row; ties share the better rank and go to the lowest id.",
    ),
}
"""By `OpSpec.name`."""
