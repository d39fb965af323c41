"""Models of attention beside states (Bamba, Jamba, Qwen3-Next, ...) in a device's operators."""

from __future__ import annotations

from quire.core.models.hybrid.describing import describe_hybrid, is_hybrid

__all__ = ["describe_hybrid", "is_hybrid"]
