"""What the runner needs of a model, whoever implements it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from quire.core.interface.attention import AttentionBackend
from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.step_context import StepContext


class LanguageModel(Protocol):
    """A loaded model on one device.

    The caller allocates a cache for each layer of each group (`attention_backends[g].allocate`),
    plans each group once a step (`attention_backends[g].plan(batch)`), calls `forward` with the
    plans, and `logits` with the rows to sample.
    """

    @property
    def description(self) -> ModelDescription:
        """What was known before the weights, with what loading has settled."""

    @property
    def attention_groups(self) -> tuple[AttentionGroup, ...]:
        """Layers that share a block table; layers count from 0 over all groups, without a gap."""

    @property
    def attention_backends(self) -> Sequence[AttentionBackend]:
        """Who keeps and attends the cache, one for each group."""

    @property
    def max_model_len(self) -> int:
        """The most tokens that a request may have, as loaded."""

    @property
    def num_parameters(self) -> int:
        """As the checkpoint has them."""

    @property
    def weight_bytes(self) -> int:
        """Memory that the weights hold on the device."""

    @property
    def can_be_recorded(self) -> bool:
        """Whether a decode step is the same device work each time, so that it may be replayed."""

    def forward(self, step: StepContext) -> Tensor:
        """Runs the T tokens of a step and writes its part of the cache.

        Returns [T, H]: whatever `logits` takes rows of.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, V] of rows [R, H] that `forward` returned."""

    def providers(self) -> dict[str, str]:
        """Operator to who serves it."""
