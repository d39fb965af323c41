"""Models without attention: Mamba and Mamba-2, in the operators of a device."""

from __future__ import annotations

from quire.core.models.state_space.describing import describe_state_space, is_state_space

__all__ = ["describe_state_space", "is_state_space"]
