"""Every operator, the paged attention and a device in plain torch: what a vendor subclasses.

`ReferenceOps`, `ReferenceAttention` and `TorchDevice` run on any torch device, so an empty subclass
of the three already serves every model; a vendor overrides what its hardware does better.
"""

from __future__ import annotations

from quire.backends.reference.attention import ReferenceAttention
from quire.backends.reference.attention_plan import ReferencePlan
from quire.backends.reference.device import TorchDevice
from quire.backends.reference.ops import ReferenceOps

__all__ = ["ReferenceAttention", "ReferenceOps", "ReferencePlan", "TorchDevice"]
