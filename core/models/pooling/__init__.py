"""Models that make vectors, labels or scores of texts: encoders, and decoders without a head."""

from __future__ import annotations

from quire.core.models.pooling.describing import describe_pooling
from quire.core.models.pooling.loading import load_pooling

__all__ = ["describe_pooling", "load_pooling"]
