"""What one forward pass needs besides the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.core.interface.attention import AttentionPlan, LayerCache


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepContext:
    """One step: the T tokens of all its requests in one flat row. Tensors are on the device."""

    token_ids: Tensor
    """int64 [T]."""
    positions: Tensor
    """int64 [T], each below the model's `max_model_len`."""
    caches: Sequence[LayerCache]
    """One for each layer."""
    plans: Sequence[AttentionPlan]
    """One for each of the model's attention groups."""
