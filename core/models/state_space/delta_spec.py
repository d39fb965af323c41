"""A gated delta net as its config describes it, and the tensors of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.models.attention_groups import PageTensor
from quire.core.models.state_space.spec import CONV, STATE
from quire.core.models.weights.weight_layout import TensorShape


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaSpec:
    """Sizes of a mixer that overwrites what it recalls.

    Source: Yang, Kautz & Hatamizadeh 2024 (Gated DeltaNet).
    """

    hidden_size: int
    num_key_heads: int
    """G: heads of queries and keys."""
    num_value_heads: int
    """M: head m reads the keys of head m // (M // G)."""
    key_size: int
    """D, of a head."""
    value_size: int
    """Dv, of a head."""
    conv_width: int
    norm_eps: float
    is_grouped: bool
    """The checkpoint has the rows of the first projection by key head, in two tensors (Qwen3-Next);
    else by what they are for, in four."""

    @property
    def keys_size(self) -> int:
        """Of the keys of all heads; the queries have as many."""
        return self.num_key_heads * self.key_size

    @property
    def values_size(self) -> int:
        """Of the values of all heads; the gates have as many."""
        return self.num_value_heads * self.value_size

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.keys_size + self.values_size

    @property
    def projected_sizes(self) -> tuple[int, int, int, int]:
        """Outputs of the first projection: what is convolved, gates, betas and time steps."""
        return self.conv_size, self.values_size, self.num_value_heads, self.num_value_heads

    @property
    def projected_size(self) -> int:
        """All of them."""
        return sum(self.projected_sizes)

    @property
    def scan(self) -> str:
        """The operator that carries the state."""
        return "gated_delta_rule"

    @property
    def pages(self) -> tuple[PageTensor, ...]:
        """What a layer keeps for each block."""
        conv = (self.conv_size, self.conv_width - 1)
        state = (self.num_value_heads, self.key_size, self.value_size)
        return (
            PageTensor(name=CONV, shape=conv, is_per_token=False),
            PageTensor(name=STATE, shape=state, is_per_token=False, dtype="float32"),
        )

    def tensors(self, prefix: str) -> dict[str, TensorShape]:
        """The tensors of one mixer, by the names that follow `prefix`."""
        convolved, gates, betas, steps = self.projected_sizes
        names: tuple[str, ...] = ("qkv", "z", "b", "a")
        sizes = [convolved, gates, betas, steps]
        if self.is_grouped:
            names, sizes = ("qkvz", "ba"), [convolved + gates, betas + steps]
        projections = zip(names, sizes, strict=True)
        shapes: dict[str, tuple[int, ...]] = {
            **{f"in_proj_{name}.weight": (size, self.hidden_size) for name, size in projections},
            "conv1d.weight": (self.conv_size, 1, self.conv_width),
            "dt_bias": (self.num_value_heads,),
            "A_log": (self.num_value_heads,),
            "norm.weight": (self.value_size,),
            "out_proj.weight": (self.hidden_size, self.values_size),
        }
        return {name: TensorShape(name=prefix + name, shape=s) for name, s in shapes.items()}
