"""What new requests bring besides tokens, from the record of a step to the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quire.core.interface.worker import Feature, FeatureArray, StepBatch
from quire.core.models.step_context import StepFeature


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFeature:
    """One feature and whose it is."""

    request: int
    """The index in the step."""
    feature: Feature

    def on(self, device: str | None) -> StepFeature:
        """With its arrays on a device."""
        arrays = {name: _tensor(a).to(device) for name, a in self.feature.arrays.items()}
        return StepFeature(request=self.request, feature=self.feature, arrays=arrays)


def new_features(batch: StepBatch) -> list[HostFeature]:
    """What the requests that are new in a step bring for an encoder, where they bring arrays."""
    features_of = {new.request_id: new.features for new in batch.new_requests if new.features}
    if not features_of:
        return []
    return [
        HostFeature(request=index, feature=feature)
        for index, request_id in enumerate(batch.request_ids)
        for feature in features_of.get(request_id, ())
        if feature.arrays and feature.offset is None
    ]


def _tensor(array: FeatureArray) -> torch.Tensor:
    dtype = np.dtype(array.dtype).newbyteorder("<")
    plain = np.frombuffer(array.data, dtype).reshape(array.shape)
    # A copy: the record's bytes may not be written to.
    return torch.from_numpy(plain.astype(dtype.newbyteorder("="), copy=True))
