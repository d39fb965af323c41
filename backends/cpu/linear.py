"""Linear layers in oneDNN's own weight layout, with results that do not depend on the batch.

`F.linear` hands oneDNN, or MKL, a plain matrix, which it copies into blocks at every call. Blocks
made once at load are read at the speed of memory. `benchmarks/cpu_linear.py` prints the comparison
for the shapes of a model; for all of them, and from 1 row to 512, the prepacked form is the fastest
that torch offers, so there is no table of exceptions here.

oneDNN sums a row in the same order whatever the number of rows, but for a single row with many
inputs, for which it has a kernel of its own. Each shape is tried at load; where one row comes out
differently it is computed as two, which costs little, since the weights are read once either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from quire.core.interface import PackedLinear

_VARIANT = "-batch-variant"
_PREPACKED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, eq=False)
class OneDnnWeights:
    """A linear layer as oneDNN wants it."""

    weight: Tensor
    """[N, K], opaque: it has a shape and a dtype but no address."""
    bias: Tensor | None
    """[N], in weight's dtype."""
    is_widened: bool
    """The weight is float32 where the activations are narrower."""
    min_rows: int
    """With fewer rows the products would be summed in another order."""


def pack(weight: Tensor, bias: Tensor | None) -> PackedLinear | None:
    """The layer in oneDNN's layout; None if this torch or this CPU has none for the dtype.

    float16 is widened where the CPU cannot multiply it: twice the memory, ten times the speed.
    """
    computed = _computed_in(weight.dtype)
    if weight.dtype not in _PREPACKED or not can_prepack(computed):
        return None
    is_widened = computed != weight.dtype
    packed = _reorder(weight.to(computed))
    # No more outputs than it takes to see the order of summation.
    min_rows = _min_rows(min(weight.shape[0], 256), weight.shape[1], computed)
    name = "onednn-blocked-float32" if is_widened else "onednn-blocked"
    return PackedLinear(
        num_inputs=weight.shape[1],
        num_outputs=weight.shape[0],
        dtype=str(weight.dtype).removeprefix("torch."),
        format=name if min_rows else f"{name}{_VARIANT}",
        size_bytes=_size_bytes(packed),
        payload=OneDnnWeights(
            packed, None if bias is None else bias.to(computed), is_widened, min_rows or 1
        ),
    )


def is_variant(packed: PackedLinear) -> bool:
    """Whether a row's result depends on how many rows there are."""
    return packed.format.endswith(_VARIANT)


def multiply(x: Tensor, layer: OneDnnWeights) -> Tensor:
    """x @ weight.T + bias, for x [T, K]."""
    if layer.is_widened:
        return _multiply_rows(x.float(), layer).to(x.dtype)
    return _multiply_rows(x, layer)


def is_batch_invariant() -> bool:
    """Whether rows of a product come out the same whatever their number, tried on some shapes.

    A shape that is used is tried again when it is packed.
    """
    return all(
        can_prepack(_computed_in(dtype)) and _min_rows(*shape, _computed_in(dtype)) is not None
        for dtype in _PREPACKED
        for shape in ((48, 64), (200, 896), (96, 3000))
    )


@cache
def _min_rows(num_outputs: int, num_inputs: int, dtype: torch.dtype) -> int | None:
    """The fewest rows from which on a row's result is always the same; None: there are none such.

    The terms of every product cancel, so that nothing but the rounding of the sum is left: another
    order of summation shows in almost every result, which in bfloat16 it otherwise does not.
    """
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randn((num_outputs, num_inputs), generator=generator)
    x = torch.randn((40, num_inputs), generator=generator)
    packed = _reorder((weight - weight.flip(-1)).to(dtype))
    x = (x + x.flip(-1)).to(dtype)
    wanted = _linear(x, packed, None)
    if not all(torch.equal(_linear(x[:n], packed, None), wanted[:n]) for n in (2, 3, 7, 33)):
        return None
    return 1 if torch.equal(_linear(x[:1], packed, None), wanted[:1]) else 2


def _multiply_rows(x: Tensor, layer: OneDnnWeights) -> Tensor:
    if x.shape[0] == 1 and layer.min_rows > 1:
        return _linear(torch.cat((x, x)), layer.weight, layer.bias)[:1]
    return _linear(x, layer.weight, layer.bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")  # noqa: SLF001
    return result


def _reorder(weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous(), None)  # noqa: SLF001
    return result


def _size_bytes(packed: Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes.default(packed))  # noqa: SLF001


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """float16 is multiplied in float32 where the CPU has no instructions for it."""
    return torch.float32 if dtype == torch.float16 and not can_prepack(dtype) else dtype


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether the operators are there, take the dtype and multiply right. Tried once."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    weight = torch.arange(-12.0, 12.0).view(6, 4).to(dtype)
    x = torch.arange(8.0).view(2, 4).to(dtype)
    try:
        packed = _reorder(weight)
        got = _linear(x, packed, None)
        _size_bytes(packed)
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(got, F.linear(x.float(), weight.float()).to(dtype))
