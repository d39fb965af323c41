"""The first projection of a gated delta net, whichever way a checkpoint has its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.weights.weight_layout import TensorShape


def projection_parts(
    spec: DeltaSpec, tensors: Mapping[str, TensorShape]
) -> tuple[TensorShape, ...]:
    """The tensors that `read_projection` reads."""
    names: tuple[str, ...] = ("in_proj_qkvz", "in_proj_ba")
    if not spec.is_grouped:
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    return tuple(tensors[f"{name}.weight"] for name in names)


def read_projection(
    spec: DeltaSpec, tensors: Mapping[str, TensorShape], read: Callable[[TensorShape], Tensor]
) -> Tensor:
    """The rows of q, k, v, z, b and a below one another, each by head: [projected_size, H].

    `tensors`: of one mixer; `read`: one of them.
    """
    parts = projection_parts(spec, tensors)
    if not spec.is_grouped:
        return torch.cat([read(part) for part in parts])
    groups, share = spec.num_key_heads, spec.num_value_heads // spec.num_key_heads
    values = share * spec.value_size
    sizes = (spec.key_size, spec.key_size, values, values)
    return torch.cat(
        [
            *_by_kind(read(parts[0]), groups, sizes),
            *_by_kind(read(parts[1]), groups, (share, share)),
        ]
    )


def _by_kind(weight: Tensor, groups: int, sizes: Sequence[int]) -> list[Tensor]:
    """Rows that lie by group, each with `sizes` rows of each kind, taken apart by kind."""
    grouped = weight.reshape(groups, sum(sizes), -1)
    return [part.flatten(0, 1) for part in grouped.split_with_sizes(list(sizes), 1)]
