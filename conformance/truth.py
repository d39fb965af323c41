"""What the small model should say, in float64, and how far rounding may lead away from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quire.conformance.numerics import UNIT_ROUNDOFF
from quire.conformance.oracles import model as oracle

Array = npt.NDArray[Any]
_BASE_FACTOR, _ROUNDOFFS = 4, 16
"""The rule of `numerics` over a whole model: rounding is passed on through two layers, and two
honest orders of it are further apart than one operator's."""


class ModelTruth:
    """The truth about the small model with weights of one dtype."""

    def __init__(self, model: oracle.TinyLlama, dtype: str) -> None:
        self._model = model
        self._dtype = dtype

    def logprobs(self, token_ids: Sequence[int]) -> tuple[Array, Array]:
        """(log-probabilities [n, V] after each token in float64, the error allowed at each [n])."""
        weights = {n: _round(w, self._dtype) for n, w in self._model.weights().items()}
        wide = {name: array.astype(np.float64) for name, array in weights.items()}
        exact = oracle.logits(self._model, wide, token_ids)
        narrow = {name: array.astype(np.float32) for name, array in weights.items()}
        base = oracle.logits(self._model, narrow, token_ids, lambda x: _round(x, self._dtype))
        u = UNIT_ROUNDOFF[self._dtype]
        off = np.abs(base - exact).max()
        slack = _BASE_FACTOR * off + _ROUNDOFFS * u * np.abs(exact).max(axis=-1)
        return oracle.log_softmax(exact), slack

    def behind(self, token_ids: Sequence[int], token: int) -> tuple[float, float]:
        """How much less likely `token` is than the best after these, and what rounding explains."""
        logprobs, slack = self.logprobs(token_ids)
        row = logprobs[-1]
        behind = float(row.max() - row[token]) if 0 <= token < len(row) else float("inf")
        return behind, 2 * float(slack[-1])


def _round(x: Array, dtype: str) -> Array:
    near = torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))
    return np.asarray(near.to(torch.float32).numpy())
