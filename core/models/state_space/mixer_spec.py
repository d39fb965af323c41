"""What the layers of a model ask of a mixer, whichever kind it is."""

from __future__ import annotations

from typing import Protocol

from quire.core.models.attention_groups import PageTensor
from quire.core.models.weights.weight_layout import TensorShape


class MixerSpec(Protocol):
    """Sizes of a mixer with a state: Mamba, Mamba-2 or a gated delta net."""

    @property
    def pages(self) -> tuple[PageTensor, ...]:
        """What a layer keeps for each block: inputs of the convolution, and the state."""

    @property
    def projected_size(self) -> int:
        """Outputs of the first projection."""

    @property
    def scan(self) -> str:
        """The operator that carries the state."""

    def tensors(self, prefix: str) -> dict[str, TensorShape]:
        """The tensors of one mixer, by the names that follow `prefix`."""
        ...
