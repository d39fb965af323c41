"""Mixtures of experts whose weights are codes: widened in registers, a tile at a time.

What each product computes is what `quantized` and `float8` compute for a layer that stands alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels_triton import expert_codes_kernels as kernels
from quire.kernels_triton.experts import ACTIVATIONS, GroupedCall, SortedPairs, tile_sizes
from quire.kernels_triton.float8 import UNITS, in_flavour, round_rows_float8
from quire.kernels_triton.launch import LaunchEntry, Launcher, power_of_two
from quire.kernels_triton.quantized import round_rows

_MIN_INPUTS = 32
"""Inputs that a matrix unit takes at a time in 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertSide:
    """One of the two products of all experts; see `QuantizedWeight` of the interface."""

    bits: int
    is_float8: bool
    units: str
    """A key of `UNITS`: in which flavour 8-bit floats and rounded inputs are multiplied."""
    group_size: int
    """Of inputs that share a scale; all of them where there is one group."""
    num_groups: int
    codes: Tensor
    """uint8 [E, N, K], or [E, N, ceil(K / 2)] for 4 bits."""
    scales: Tensor
    """[E, N, G]."""
    zeros: Tensor | None
    """uint8 [E, N, G]."""
    bias: Tensor | None
    """[E, N]."""
    activations: str
    """`none`, `token` or `group`."""

    @property
    def num_bytes(self) -> int:
        """Of codes, scales and zeros."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.codes.nbytes + self.scales.nbytes + zeros

    @property
    def num_input_groups(self) -> int:
        """Scales of a rounded row of inputs; 0: they are not rounded."""
        if self.activations == "none":
            return 0
        return self.num_groups if self.activations == "group" else 1


def pack_side(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor] | None,
    bias: Tensor | None,
    *,
    bits: int,
    group_size: int,
    num_inputs: int,
    activations: str,
    is_float8: bool,
    units: str,
) -> ExpertSide:
    """One product of E experts; `units`: the 8-bit floats that the device multiplies, or empty."""
    units = units if is_float8 and activations != "none" else ""
    together, scaled = torch.stack(list(codes)), torch.stack(list(scales))
    if is_float8:
        together, scaled = in_flavour(together, scaled, units)
    return ExpertSide(
        bits=bits,
        is_float8=is_float8,
        units=units,
        group_size=group_size or num_inputs,
        num_groups=scaled.shape[-1],
        codes=together,
        scales=scaled,
        zeros=None if zeros is None else torch.stack(list(zeros)),
        bias=None if bias is None else bias.contiguous(),
        activations=activations,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertCodes:
    """The experts of one layer: see `QuantizedExperts` of the interface."""

    gate_up: ExpertSide
    down: ExpertSide
    activation: str
    alpha: float
    limit: float


def run_expert_codes(
    launcher: Launcher,
    x: Tensor,
    layer: ExpertCodes,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    weighs_input: bool,
) -> Tensor:
    """As `experts.run_experts`, by codes."""
    pairs_per_row = expert_ids.shape[1]
    if weighs_input:
        # Inputs are rounded after they are weighed, so every pair has its own.
        x = (x.float().unsqueeze(1) * weights.unsqueeze(-1)).to(x.dtype).flatten(0, 1)
        pairs_per_row = 1
    call = _CodesCall(launcher, x, weights, expert_ids, weighs_input, layer, pairs_per_row)
    return call.run()


@dataclass(frozen=True, slots=True, eq=False)
class _CodesCall(GroupedCall):
    layer: ExpertCodes
    pairs_per_row: int
    """How many pairs share a row of x, one after the other."""

    @property
    def num_experts(self) -> int:
        return self.layer.gate_up.codes.shape[0]

    def entries(self, tile: int) -> tuple[LaunchEntry, LaunchEntry]:
        sides = (("expert_codes_up", self.layer.gate_up), ("expert_codes_down", self.layer.down))
        up, down = (
            self.launcher.find(
                kernel,
                item_size=self.x.element_size(),
                tile=tile,
                bits=side.bits,
                is_float8=side.is_float8,
                is_rounded=side.num_input_groups > 0,
            )
            for kernel, side in sides
        )
        return up, down

    def up(self, entry: LaunchEntry, pairs: SortedPairs) -> Tensor:
        side = self.layer.gate_up
        hidden, inner = self.x.shape[1], side.codes.shape[1] // 2
        out = self.x.new_empty((self.expert_ids.numel(), inner))
        values, x_scales = self._rounded(self.x, side)
        tiles, num_columns = self._tiles(entry, pairs.tile, inner, hidden, side)
        self.launcher.start(
            kernels.expert_codes_up_kernel,
            (pairs.num_tiles, num_columns),
            [
                *(values, x_scales, *_weights(side, self.x), *pairs.tensors, out),
                *(self.num_experts, inner, values.stride(0), side.codes.stride(1)),
                *(self.layer.alpha, self.layer.limit),
            ],
            {
                "K": self.pairs_per_row,
                "KIND": ACTIVATIONS.index(self.layer.activation),
                **_form(side),
                **tiles,
            },
            entry,
        )
        return out

    def down(self, entry: LaunchEntry, inner: Tensor, pairs: SortedPairs) -> Tensor:
        side = self.layer.down
        hidden = side.codes.shape[1]
        out = torch.empty((len(inner), hidden), dtype=torch.float32, device=inner.device)
        values, x_scales = self._rounded(inner, side)
        tiles, num_columns = self._tiles(entry, pairs.tile, hidden, inner.shape[1], side)
        self.launcher.start(
            kernels.expert_codes_down_kernel,
            (pairs.num_tiles, num_columns),
            [
                *(values, x_scales, *_weights(side, inner), self.weights, *pairs.tensors, out),
                *(self.num_experts, hidden, values.stride(0), side.codes.stride(1)),
            ],
            {"WEIGHS_INPUT": self.weighs_input, **_form(side), **tiles},
            entry,
        )
        return out

    def _rounded(self, x: Tensor, side: ExpertSide) -> tuple[Tensor, Tensor]:
        """Inputs as the product takes them, and their scales."""
        groups = side.num_input_groups
        if not groups:
            return x, x
        if side.is_float8:
            return round_rows_float8(self.launcher, x, groups, side.units)
        return round_rows(self.launcher, x, groups)

    def _tiles(
        self, entry: LaunchEntry, tile: int, num_outputs: int, num_inputs: int, side: ExpertSide
    ) -> tuple[dict[str, int], int]:
        tiles, num_columns = tile_sizes(entry, tile, num_outputs, num_inputs)
        block_k = min(tiles["BLOCK_K"], power_of_two(side.group_size))
        return {**tiles, "BLOCK_K": max(_MIN_INPUTS, block_k)}, num_columns


def _weights(side: ExpertSide, absent: Tensor) -> list[Tensor]:
    """Codes, scales, zeros and biases; `absent` stands for what there is not."""
    zeros = side.codes if side.zeros is None else side.zeros
    return [side.codes, side.scales, zeros, absent if side.bias is None else side.bias]


def _form(side: ExpertSide) -> dict[str, int | bool]:
    groups, is_float8 = side.num_input_groups, side.is_float8
    return {
        "BITS": side.bits,
        "GROUPS": side.num_groups,
        "SIZE": side.group_size,
        "X_GROUPS": groups,
        "FLOAT8": is_float8,
        "UNITS": UNITS[side.units],
        "HAS_ZEROS": side.zeros is not None,
        "HAS_BIAS": side.bias is not None,
        "IS_WHOLE": not is_float8 and groups > 0 and (side.bits == 4 or side.zeros is None),
    }
