"""What comes after a model's body: its own head on rows of texts, or a vector of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from quire.core.errors import CheckpointError, Reason, UnsupportedError
from quire.core.models.pooling.layout import DenseStage, VectorLayout

_ACTIVATIONS = {
    "Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU,
    "Sigmoid": nn.Sigmoid, "SiLU": nn.SiLU,
}  # fmt: skip


class Head:
    """A model's own head, run around a body that answers with rows that are there already."""

    def __init__(self, model: Any, body: Any) -> None:
        self._model = model
        self._body = body

    def logits(self, rows: Tensor, token_ids: Tensor, kept: Any) -> Tensor:
        """Logits [R, L] or [R, n, L] of rows [R, n, H]; `kept`: an output in the body's form."""
        stand_in = copy.copy(kept)
        for name in list(stand_in.keys()):
            if name not in ("last_hidden_state", "pooler_output"):
                stand_in[name] = None
        stand_in["last_hidden_state"] = rows
        pooler = getattr(self._body, "pooler", None)
        if getattr(kept, "pooler_output", None) is not None and pooler is not None:
            stand_in["pooler_output"] = pooler(rows)
        original = self._body.forward
        self._body.forward = lambda *_, **__: stand_in
        try:
            logits: Tensor = self._model(input_ids=token_ids).logits
            return logits
        finally:
            self._body.forward = original


class VectorHead:
    """Rows of a text to one vector, as a sentence-transformers folder says."""

    def __init__(self, layout: VectorLayout, *, device: Any, dtype: torch.dtype) -> None:
        """Reads the weights of dense stages. Raises: CheckpointError, UnsupportedError."""
        self._layout = layout
        self._stages = [_load_dense(stage, device, dtype) for stage in layout.dense]

    def vectors(self, rows: Sequence[Tensor]) -> Tensor:
        """float32 [R, D] of R texts' rows [n, H]; not normalized yet."""
        pooled = torch.stack([self._pool(part) for part in rows])
        for stage in self._stages:
            pooled = stage(pooled)
        return pooled.float()

    def finish(self, vector: Tensor, *, dimensions: int | None, is_normalized: bool) -> Tensor:
        """The first `dimensions` of a vector, of length one if that is asked and meant."""
        if dimensions is not None:
            vector = vector[:dimensions]
        if is_normalized and (self._layout.is_normalized or dimensions is not None):
            return functional.normalize(vector, dim=-1)
        return vector

    def _pool(self, rows: Tensor) -> Tensor:
        parts = [_POOLS[mode](rows) for mode in self._layout.modes]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _weighted_mean(rows: Tensor) -> Tensor:
    """Later tokens weigh more: 1, 2, ..., n. Source: SGPT, equation 3."""
    weights = torch.arange(1, len(rows) + 1, device=rows.device, dtype=rows.dtype)
    return (rows * weights.unsqueeze(1)).sum(0) / weights.sum()


_POOLS = {
    "cls": lambda rows: rows[0],
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.mean(0),
    "mean_sqrt_len": lambda rows: rows.sum(0) / len(rows) ** 0.5,
    "max": lambda rows: rows.amax(0),
    "weighted_mean": _weighted_mean,
}


def _load_dense(stage: DenseStage, device: Any, dtype: torch.dtype) -> nn.Module:
    if stage.activation not in _ACTIVATIONS:
        reason = Reason(
            code="model.activation", need=stage.activation, have=", ".join(_ACTIVATIONS),
            remedy="use a model with one of these in its Dense stage",
        )  # fmt: skip
        raise UnsupportedError([reason], what=f"the stage in {stage.directory}")
    linear = nn.Linear(stage.num_in, stage.num_out, bias=stage.has_bias)
    weights = _read_weights(stage)
    try:
        state = {name.removeprefix("linear."): tensor for name, tensor in weights.items()}
        linear.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{stage.directory} does not fit its config: {error}") from error
    return nn.Sequential(linear, _ACTIVATIONS[stage.activation]()).to(device, dtype).eval()


def _read_weights(stage: DenseStage) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = stage.directory / "model.safetensors"
    if path.is_file():
        return load_file(path)
    path = stage.directory / "pytorch_model.bin"
    if path.is_file():
        weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return weights
    raise CheckpointError(f"{stage.directory} has no model.safetensors; download it again")


def activation_of(config: Any) -> str:
    """`sigmoid`, `softmax` or `none`: what makes probabilities of a classifier's logits.

    Source: cross-encoders name theirs; else `problem_type`; else one label is a sigmoid.
    """
    named = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn") or getattr(
        config, "sbert_ce_default_activation_function", None
    )
    if named:
        last = str(named).rsplit(".", 1)[-1].lower()
        return {"identity": "none", "sigmoid": "sigmoid", "softmax": "softmax"}.get(last, "none")
    by_problem = {
        "regression": "none",
        "multi_label_classification": "sigmoid",
        "single_label_classification": "softmax",
    }
    problem = getattr(config, "problem_type", None)
    if problem in by_problem and not (problem.startswith("single") and config.num_labels == 1):
        return by_problem[problem]
    return "sigmoid" if config.num_labels == 1 else "softmax"


def activated(logits: Tensor, activation: str) -> Tensor:
    """float32 probabilities of logits [..., L]."""
    if activation == "sigmoid":
        return logits.sigmoid()
    return logits.softmax(-1) if activation == "softmax" else logits
