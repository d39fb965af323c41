"""Rotary frequencies that depend on the length of a text, fixed once for all texts.

transformers chooses them by the longest text of the moment, so that a token would depend on who
else is in the batch. Here the choice is made at load by `max_model_len`, as the native families
make it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_BY_LENGTH = ("dynamic", "longrope")


def fix_frequencies(model: nn.Module, max_model_len: int) -> None:
    """Computes every such table for `max_model_len` and lets nobody change it afterwards."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for module in model.modules():
        rope: Any = module
        rope_type = getattr(rope, "rope_type", None)
        if not isinstance(rope_type, str) or rope_type not in _BY_LENGTH:
            continue
        compute: Any = ROPE_INIT_FUNCTIONS[rope_type]
        device = rope.inv_freq.device
        frequencies, scaling = compute(rope.config, device, seq_len=max_model_len)
        rope.register_buffer("inv_freq", frequencies, persistent=False)
        rope.attention_scaling = scaling
        # Read by the decorator that would choose anew.
        rope.rope_type = "default"
