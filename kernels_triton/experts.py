"""Mixtures of experts: routing, and the grouped products of what the experts do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from quire.kernels_triton import experts_kernels as kernels
from quire.kernels_triton.launch import LaunchEntry, Launcher, ceil_div, power_of_two

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")
MAX_EXPERTS = 1024
"""How many one program of the router holds."""
_MIN_TILE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How a token chooses; see `RoutingSpec` of the interface."""

    num_experts: int
    num_chosen: int
    is_sigmoid: bool
    is_renormalised: bool
    scale: float
    num_groups: int
    num_kept_groups: int
    sums_two: bool
    """A group's score is the sum of its two largest."""


def route(
    launcher: Launcher, logits: Tensor, routing: Routing, correction_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(weights float32 [T, k], expert ids int64 [T, k]) for logits float32 [T, E], dense rows."""
    num_tokens = logits.shape[0]
    shape = (num_tokens, routing.num_chosen)
    weights = logits.new_empty(shape)
    ids = torch.empty(shape, dtype=torch.int64, device=logits.device)
    entry = launcher.find("route")
    rows = max(1, min(entry.constants["ROWS"], power_of_two(num_tokens)))
    bias = logits if correction_bias is None else correction_bias
    launcher.start(
        kernels.route_kernel,
        (ceil_div(num_tokens, rows),),
        [logits, bias, weights, ids, num_tokens, logits.stride(0), routing.scale],
        {
            "E": routing.num_experts,
            "BLOCK_E": power_of_two(routing.num_experts),
            "K": routing.num_chosen,
            "BLOCK_K": power_of_two(routing.num_chosen),
            "ROWS": rows,
            "GROUPS": routing.num_groups,
            "BLOCK_G": power_of_two(routing.num_groups),
            "KEPT": routing.num_kept_groups,
            "TOP2": routing.sums_two,
            "SIGMOID": routing.is_sigmoid,
            "RENORMALISED": routing.is_renormalised,
            "HAS_BIAS": correction_bias is not None,
        },
        entry,
    )
    return weights, ids


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """The weights of one layer's experts, contiguous: see `ExpertWeights` of the interface."""

    gate_up: Tensor
    """[E, 2I, H]."""
    down: Tensor
    """[E, H, I]."""
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str
    alpha: float
    limit: float


def run_experts(
    launcher: Launcher,
    x: Tensor,
    layer: Experts,
    weights: Tensor,
    expert_ids: Tensor,
    *,
    weighs_input: bool,
) -> Tensor:
    """The weighted sum of each token's experts: [T, H] for x [T, H] with dense rows.

    weights float32 and expert_ids int64 [T, k], contiguous. Nothing is asked of the host, so the
    launches can be recorded.
    """
    return _WideCall(launcher, x, weights, expert_ids, weighs_input, layer).run()


@dataclass(frozen=True, slots=True, eq=False)
class SortedPairs:
    """Pairs of tokens and experts, numbered token * k + i, in the order of their experts."""

    order: Tensor
    """int32 [T * k]: the pairs' numbers."""
    starts: Tensor
    """int32 [E + 1]: where each expert's begin among them."""
    tiles: Tensor
    """int32 [E + 1]: where each expert's tiles begin."""
    tile: int
    """Pairs of a tile."""
    num_tiles: int
    """As many as there may be, whatever tokens choose."""

    @property
    def tensors(self) -> list[Tensor]:
        """What kernels take."""
        return [self.order, self.starts, self.tiles]


@dataclass(frozen=True, slots=True, eq=False)
class GroupedCall(ABC):
    """One call of a layer's experts; how their weights are kept is a subclass's knowledge."""

    launcher: Launcher
    x: Tensor
    weights: Tensor
    expert_ids: Tensor
    weighs_input: bool

    def run(self) -> Tensor:
        """The weighted sum of each token's experts: [T, H]."""
        hidden = self.x.shape[1]
        num_tokens, k = self.expert_ids.shape
        out = self.x.new_empty((num_tokens, hidden))
        if num_tokens == 0:
            return out
        # About as many pairs as an expert gets decide how tall a tile is.
        mean = ceil_div(num_tokens * k, self.num_experts)
        up, down = self.entries(max(_MIN_TILE, power_of_two(mean)))
        pairs = self._sort(max(_MIN_TILE, up.constants["BLOCK_M"]))
        parts = self.down(down, self.up(up, pairs), pairs)
        entry = self.launcher.find("experts_sum")
        block = min(entry.constants["BLOCK"], power_of_two(hidden))
        self.launcher.start(
            kernels.experts_sum_kernel,
            (num_tokens, ceil_div(hidden, block)),
            [parts, out, hidden],
            {"K": k, "BLOCK": block},
            entry,
        )
        return out

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Of the layer."""

    @abstractmethod
    def entries(self, tile: int) -> tuple[LaunchEntry, LaunchEntry]:
        """The table's rows for both products, where an expert gets about `tile` pairs."""

    @abstractmethod
    def up(self, entry: LaunchEntry, pairs: SortedPairs) -> Tensor:
        """The activated inner values of all pairs, sorted: [T * k, I] in x's dtype."""

    @abstractmethod
    def down(self, entry: LaunchEntry, inner: Tensor, pairs: SortedPairs) -> Tensor:
        """What each pair adds to its token, in the order of tokens: float32 [T * k, H]."""

    def _sort(self, tile: int) -> SortedPairs:
        count, pairs = self.num_experts, self.expert_ids.numel()

        def make(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.int32, device=self.x.device)

        order, starts, tiles = make(pairs), make(count + 1), make(count + 1)
        entry = self.launcher.find("sort_pairs")
        block = min(entry.constants["BLOCK"], power_of_two(pairs))
        arguments = [self.expert_ids, order, starts, pairs, count]
        self.launcher.start(kernels.sort_pairs_kernel, (count,), arguments, {"BLOCK": block}, entry)
        constants = {"E": count, "BLOCK_E": power_of_two(count), "BLOCK_M": tile}
        entry = self.launcher.find("expert_tiles")
        self.launcher.start(kernels.expert_tiles_kernel, (1,), [starts, tiles], constants, entry)
        return SortedPairs(order, starts, tiles, tile, ceil_div(pairs, tile) + min(count, pairs))


@dataclass(frozen=True, slots=True, eq=False)
class _WideCall(GroupedCall):
    layer: Experts

    @property
    def num_experts(self) -> int:
        return self.layer.gate_up.shape[0]

    def entries(self, tile: int) -> tuple[LaunchEntry, LaunchEntry]:
        up, down = (
            self.launcher.find(kernel, item_size=self.x.element_size(), tile=tile)
            for kernel in ("experts_up", "experts_down")
        )
        return up, down

    def up(self, entry: LaunchEntry, pairs: SortedPairs) -> Tensor:
        layer, hidden = self.layer, self.x.shape[1]
        inner = layer.gate_up.shape[1] // 2
        out = self.x.new_empty((self.expert_ids.numel(), inner))
        bias = self.x if layer.gate_up_bias is None else layer.gate_up_bias
        tensors = [self.x, layer.gate_up, bias, self.weights, *pairs.tensors, out]
        numbers = [self.num_experts, hidden, inner, self.x.stride(0), layer.alpha, layer.limit]
        constants = {
            "K": self.expert_ids.shape[1],
            "KIND": ACTIVATIONS.index(layer.activation),
            "HAS_BIAS": layer.gate_up_bias is not None,
            "WEIGHS_INPUT": self.weighs_input,
        }
        tiles, num_columns = tile_sizes(entry, pairs.tile, inner, hidden)
        self.launcher.start(
            kernels.experts_up_kernel,
            (pairs.num_tiles, num_columns),
            [*tensors, *numbers],
            {**constants, **tiles},
            entry,
        )
        return out

    def down(self, entry: LaunchEntry, inner: Tensor, pairs: SortedPairs) -> Tensor:
        layer, hidden = self.layer, self.x.shape[1]
        out = torch.empty((len(inner), hidden), dtype=torch.float32, device=self.x.device)
        bias = inner if layer.down_bias is None else layer.down_bias
        tensors = [inner, layer.down, bias, self.weights, *pairs.tensors, out]
        constants = {"HAS_BIAS": layer.down_bias is not None, "WEIGHS_INPUT": self.weighs_input}
        tiles, num_columns = tile_sizes(entry, pairs.tile, hidden, inner.shape[1])
        self.launcher.start(
            kernels.experts_down_kernel,
            (pairs.num_tiles, num_columns),
            [*tensors, self.num_experts, hidden, inner.shape[1]],
            {**constants, **tiles},
            entry,
        )
        return out


def tile_sizes(
    entry: LaunchEntry, tile: int, num_outputs: int, num_inputs: int
) -> tuple[dict[str, int], int]:
    """Tile sizes, no larger than the layer, and the number of tiles across the outputs."""
    block_n = max(_MIN_TILE, min(entry.constants["BLOCK_N"], power_of_two(num_outputs)))
    block_k = max(_MIN_TILE, min(entry.constants["BLOCK_K"], power_of_two(num_inputs)))
    tiles = {"BLOCK_M": tile, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return tiles, ceil_div(num_outputs, block_n)
