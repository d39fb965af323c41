"""What one forward pass needs besides the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire.core.interface.attention import AttentionPlan, LayerCache
from quire.core.interface.worker import Feature
from quire.core.models.step_images import RequestImages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepFeature:
    """What a request that is new in this step brings besides its tokens."""

    request: int
    """Its index in the step."""
    feature: Feature
    arrays: dict[str, Tensor]
    """The feature's arrays, on the device."""


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
    features: Sequence[StepFeature] = ()
    """In the order of the step's requests; those whose arrays are in the cache already are left
    out."""
    images: Sequence[RequestImages] = ()
    """Of every request in the step that brings images, whether this step needs them or not."""
