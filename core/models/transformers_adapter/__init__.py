"""Runs any causal language model that transformers can load, in transformers' own code.

Three ways, the first that gives the model's own logits:

    paged      one flat token batch; attention goes to the device through AttentionInterface
    cached     request by request, with a transformers Cache filled from pages and read back
    recomputed request by request, the whole text at every step; pages hold token ids

Which one is found by a dry run and held, at load, against the model's own run on its own weights.
"""

from __future__ import annotations

from quire.core.models.transformers_adapter.describing import describe_adapted
from quire.core.models.transformers_adapter.loading import load_adapted

__all__ = ["describe_adapted", "load_adapted"]
