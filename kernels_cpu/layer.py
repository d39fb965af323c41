"""Layers in one call: mixings and an MLP around a residual, one layer after the other."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, TypeAlias

from quire.kernels_cpu import checks, native
from quire.kernels_cpu.delta_mixer import FusedDelta
from quire.kernels_cpu.elementwise import GATES
from quire.kernels_cpu.heads import FusedHeads, check_norms, check_products
from quire.kernels_cpu.latent import FusedLatent
from quire.kernels_cpu.linear import PackedWeights
from quire.kernels_cpu.mixer import FusedMixer
from quire.kernels_cpu.mixture import FusedMixture

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from quire.kernels_cpu.step import Rounds, Step

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu

FusedMixing: TypeAlias = FusedHeads | FusedLatent | FusedMixer | FusedDelta
"""What tells the tokens of a text of one another in a layer."""

FusedMlp: TypeAlias = tuple[PackedWeights, PackedWeights] | FusedMixture
"""Gate and up, stacked, and down; or a mixture of experts."""


class FusedWholeLayer:
    """The kernels of a layer's operators in their order, for a `LayerChain` to call.

    What the mixings make of x is added up. norms [H]: of that sum, before the MLP, after the MLP,
    of what follows; the last is there, and the second if there is an MLP. `gate` is that of an MLP
    which is no mixture. A layer without an MLP may have a residual in float32: sums are taken
    there, and rounded to the dtype before the norm.
    Raises: ValueError, TypeError for parts that do not fit each other.
    """

    __slots__ = ("_kept", "handle", "is_residual_wide", "mixings", "row_kind")

    def __init__(
        self,
        mixings: Sequence[FusedMixing],
        mlp: FusedMlp | None,
        norms: Sequence[Tensor | None],
        *,
        gate: str,
        eps: float,
        is_residual_wide: bool = False,
    ) -> None:
        native.require_native()
        if len({mixing.row_kind for mixing in mixings}) != 1:
            raise ValueError("the mixings of a layer have one hidden size and one dtype")
        self.mixings = tuple(mixings)
        self.row_kind: tuple[int, torch.dtype] = mixings[0].row_kind
        hidden_size, dtype = self.row_kind
        check_norms(dtype, norms, [hidden_size] * 4)
        if (norms[1] is None) != (mlp is None) or norms[3] is None:
            raise ValueError("the norm before an MLP and that of what follows cannot be None")
        if mlp is not None and is_residual_wide:
            raise ValueError("a residual in float32 is for layers without an MLP")
        self.is_residual_wide = is_residual_wide
        if gate not in GATES:
            raise ValueError(f"no gate named {gate!r}; there are {', '.join(GATES)}")
        gate_up, down, mixture = _handles(mlp, hidden_size, dtype)
        self._kept = (mlp, tuple(norms))
        self.handle = _cpu.Layer(
            checks.dtype_code(dtype),
            dtype.itemsize,
            hidden_size,
            [mixing.handle for mixing in mixings],
            gate_up,
            down,
            mixture,
            [checks.address_of(norm) for norm in norms],
            GATES[gate],
            eps,
            is_residual_wide,
        )


class LayerChain:
    """Layers one after the other, in one call; the result of their operators.

    caches, parts, ropes: of each mixing of each layer, which of the caches, of the parts of a step
    and of the angles of a call are its own; of the last, 0 where it needs none.
    Raises: ValueError if the layers do not fit each other or share angles that they cannot share.
    """

    __slots__ = (
        "_dtype", "_handle", "_hidden_size", "_layers", "_num_angles", "_places", "_residual_dtype",
    )  # fmt: skip

    def __init__(
        self,
        layers: Sequence[FusedWholeLayer],
        caches: Sequence[Sequence[int]],
        parts: Sequence[Sequence[int]],
        ropes: Sequence[Sequence[int]],
    ) -> None:
        native.require_native()
        kinds = {(layer.row_kind, layer.is_residual_wide) for layer in layers}
        if len(kinds) != 1:
            raise ValueError("layers that follow each other have one hidden size and one dtype")
        self._layers = tuple(layers)
        self._residual_dtype = "float32" if layers[0].is_residual_wide else ""
        self._hidden_size, self._dtype = layers[0].row_kind
        self._num_angles = _angles_of(layers, ropes)
        self._places = [
            (mixing, place)
            for layer, places in zip(layers, caches, strict=True)
            for mixing, place in zip(layer.mixings, places, strict=True)
        ]
        handles = [layer.handle for layer in layers]
        self._handle = _cpu.LayerChain(
            handles, [[*one] for one in parts], [[*one] for one in ropes]
        )

    def bind(self, caches: Sequence[Mapping[str, Tensor]]) -> None:
        """All caches of the model; each mixing takes its own. Raises: ValueError, TypeError."""
        for mixing, place in self._places:
            mixing.bind(caches[place])

    def run(
        self,
        x: Tensor,
        residual: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        parts: Sequence[Step | Rounds],
    ) -> None:
        """x [T, H], normalised, becomes the normalised input of what follows; adds to `residual`.

        x, residual contiguous, the latter float32 if it is wide; angles: (cos, sin) float32 [T, F]
        for each rope, or factors [T, 1] twice. Keys, values and states of the step are written to
        the caches that were bound.
        Raises: ValueError, TypeError, IndexError.
        """
        num_tokens = parts[0].num_tokens
        shape = (num_tokens, self._hidden_size)
        dtype = str(self._dtype).removeprefix("torch.")
        checks.check_contiguous("x", x, dtype, shape)
        checks.check_contiguous("residual", residual, self._residual_dtype or dtype, shape)
        handles = [part.handle for part in parts]
        rotations = [
            _rotation(pair, num_tokens, self._num_angles.get(rope, 0))
            for rope, pair in enumerate(angles)
        ]
        # A mixing that needs no angles is given the first.
        self._handle.run(handles, x.data_ptr(), residual.data_ptr(), rotations or [_NO_ANGLES])


_NO_ANGLES = (0, 0, 0, 0)


def _angles_of(layers: Sequence[FusedWholeLayer], ropes: Sequence[Sequence[int]]) -> dict[int, int]:
    """How many numbers of a token the angles of each rope have."""
    asked = defaultdict[int, set[int]](set)
    for layer, places in zip(layers, ropes, strict=True):
        for mixing, rope in zip(layer.mixings, places, strict=True):
            if mixing.num_angles:
                asked[rope].add(mixing.num_angles)
    for rope, sizes in asked.items():
        if len(sizes) > 1:
            raise ValueError(f"layers ask rope {rope} for {sorted(sizes)} angles of a token")
    return {rope: sizes.pop() for rope, sizes in asked.items()}


def _rotation(
    pair: tuple[Tensor, Tensor], num_tokens: int, count: int
) -> tuple[int, int, int, int]:
    """Addresses and row strides of cosines and sines float32 [T, count]. 0: nobody reads them."""
    cos, sin = pair
    if not count:
        return _NO_ANGLES
    if cos.shape[1] != count:
        raise ValueError(f"cos has {cos.shape[1]} pairs, expected {count}")
    strides = checks.check_rotation(cos, sin, num_tokens, 2 * count)
    return cos.data_ptr(), sin.data_ptr(), *strides


def _handles(mlp: FusedMlp | None, hidden_size: int, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Of gate and up, of down, and of a mixture; None where there is none."""
    if mlp is None:
        return None, None, None
    if not isinstance(mlp, FusedMixture):
        gate_up, down = mlp
        check_products(
            gate_up=(gate_up, 2 * down.num_inputs, hidden_size),
            down=(down, hidden_size, down.num_inputs),
        )
        return gate_up.handle, down.handle, None
    if mlp.dtype != dtype:
        raise TypeError(f"the mixture takes rows of {mlp.dtype}, the layer {dtype}")
    if mlp.hidden_size != hidden_size:
        raise ValueError(f"the mixture takes rows of {mlp.hidden_size}, the layer {hidden_size}")
    return None, None, mlp.handle
