"""Models of attention beside states: Bamba, Falcon-H1 and Jamba, in the operators of a device."""

from __future__ import annotations

from quire.core.models.hybrid.describing import describe_hybrid, is_hybrid

__all__ = ["describe_hybrid", "is_hybrid"]
