"""Runs encoder-decoders that transformers can load, in transformers' own code.

The encoder runs once for a request, in its first step; the keys and values that every decoder layer
makes of its output go to a cache group of kind `cross`. The decoder then runs like any other model.
"""

from __future__ import annotations

from quire.core.models.seq2seq.describing import describe_seq2seq
from quire.core.models.seq2seq.loading import is_seq2seq, load_seq2seq

__all__ = ["describe_seq2seq", "is_seq2seq", "load_seq2seq"]
