"""What a model that sees is told of the requests of a step that bring images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quire.core.interface.worker import Feature, FeatureArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestImages:
    """One request that brings images, as far as this step computes it."""

    begin: int
    """Its first row in the step."""
    num_computed: int
    num_new: int
    prompt_ids: Sequence[int]
    features: Sequence[Feature]
    """Those with an offset: they stand for tokens of the prompt."""
    block_ids: Sequence[Any]
    """int [blocks] for each cache group."""
    memo: dict[str, Any]
    """The model's own, kept as long as the worker remembers the request."""


def feature_tensor(array: FeatureArray) -> torch.Tensor:
    """One array of a feature as a tensor of the host."""
    dtype = np.dtype(array.dtype).newbyteorder("<")
    plain = np.frombuffer(array.data, dtype).reshape(array.shape)
    # A copy: the record's bytes may not be written to.
    return torch.from_numpy(plain.astype(dtype.newbyteorder("="), copy=True))
