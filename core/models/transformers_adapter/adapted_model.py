"""What every way of running a transformers model has in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quire.core.interface.attention import AttentionBackend
from quire.core.models.attention_groups import AttentionGroup
from quire.core.models.description import ModelDescription
from quire.core.models.step_context import StepContext
from quire.core.models.transformers_adapter.text_model import TextModel


class AdaptedModel:
    """A `LanguageModel` around a `TextModel`; subclasses bring `forward`."""

    can_be_recorded = False
    way = ""
    """`paged`, `cached` or `recomputed`, as `providers` shows it."""

    def __init__(
        self,
        text_model: TextModel,
        description: ModelDescription,
        backends: Sequence[AttentionBackend],
        *,
        max_model_len: int,
    ) -> None:
        self.description = description
        self.attention_groups: tuple[AttentionGroup, ...] = description.attention_groups
        self.attention_backends = tuple(backends)
        self.max_model_len = max_model_len
        self.num_parameters = description.num_parameters
        self.weight_bytes = sum(p.nbytes for p in text_model.model.parameters())
        self.routed_providers: dict[str, str] = {}
        """Operator to who serves it, for layers that the device computes."""
        self._text_model = text_model

    def forward(self, step: StepContext) -> Tensor:
        """Runs the T tokens of a step; rows [T, H]."""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits float32 [R, V] of rows [R, H] that `forward` returned."""
        return self._text_model.logits(hidden)

    def providers(self) -> dict[str, str]:
        """Everything is transformers' but paged attention and the layers taken over."""
        by_group = {
            group.name: backend.provider()
            for group, backend in zip(self.attention_groups, self.attention_backends, strict=True)
        }
        served = {"forward": f"transformers ({self.way})", **self.routed_providers}
        if len(set(by_group.values())) == 1:
            return {**served, "paged_attention": next(iter(by_group.values()))}
        return {**served, **{f"paged_attention[{name}]": who for name, who in by_group.items()}}


def layers_in_order(groups: Sequence[AttentionGroup]) -> dict[int, int]:
    """Layer to the index of its group."""
    return {layer: index for index, group in enumerate(groups) for layer in group.layers}
