"""The first projection of a gated delta net, whichever way a checkpoint has its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from quire.core.models.state_space.delta_spec import DeltaSpec
from quire.core.models.weights.weight_layout import TensorShape


def read_projection(
    spec: DeltaSpec, tensors: Mapping[str, TensorShape], read: Callable[[TensorShape], Tensor]
) -> Tensor:
    """The rows of q, k, v, z, b and a below one another, each by head: [projected_size, H].

    `tensors`: of one mixer; `read`: one of them.
    """
    if not spec.is_grouped:
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        return torch.cat([read(tensors[f"{name}.weight"]) for name in names])
    groups, share = spec.num_key_heads, spec.num_value_heads // spec.num_key_heads
    values = share * spec.value_size
    sizes = (spec.key_size, spec.key_size, values, values)
    return torch.cat(
        [
            *_by_kind(read(tensors["in_proj_qkvz.weight"]), groups, sizes),
            *_by_kind(read(tensors["in_proj_ba.weight"]), groups, (share, share)),
        ]
    )


def _by_kind(weight: Tensor, groups: int, sizes: Sequence[int]) -> list[Tensor]:
    """Rows that lie by group, each with `sizes` rows of each kind, taken apart by kind."""
    grouped = weight.reshape(groups, sum(sizes), -1)
    return [part.flatten(0, 1) for part in grouped.split_with_sizes(list(sizes), 1)]
