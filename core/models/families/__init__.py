"""The families of models that Quire runs natively: one small module each, and a table of them.

register_family("MyForCausalLM", describe=describe, names=WeightNames(...), model_types=("my",))
"""

from __future__ import annotations

from quire.core.models.families import (
    deepseek,
    gemma2,
    gemma3,
    llama,
    llama4,
    mistral,
    mixtures,
    phi3,
    qwen2,
    qwen3,
)
from quire.core.models.families.registry import (
    Family,
    family_of,
    known_architectures,
    register_family,
)

__all__ = ["Family", "family_of", "known_architectures", "register_family"]

for _module in (
    llama,
    llama4,
    mistral,
    qwen2,
    qwen3,
    gemma2,
    gemma3,
    phi3,
    mixtures,
    deepseek,
):
    _module.register()
