"""What a sentence-transformers folder says: how rows become a vector, and how long a text may be.

modules.json names the stages in order: Transformer, Pooling, any number of Dense, Normalize.
Source: the saved form of sentence-transformers 2 to 5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.core.errors import CheckpointError, Reason, UnsupportedError
from quire.core.models.model_config import read_json
from quire.core.models.pooling_purpose import MODULES_FILE

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
"""In the order in which sentence-transformers joins them."""
_BY_NAME = {
    "cls": "cls", "max": "max", "mean": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean", "lasttoken": "last",
}  # fmt: skip
_LENGTH_FILES = ("sentence_bert_config.json", "sentence_roberta_config.json",
                 "sentence_distilbert_config.json", "sentence_mpnet_config.json",
                 "sentence_xlm-roberta_config.json")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseStage:
    """One linear layer after pooling."""

    directory: Path
    num_in: int
    num_out: int
    has_bias: bool
    activation: str
    """The last part of the class's name: `Tanh`, `Identity`, `GELU`, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorLayout:
    """From rows of hidden states to one vector."""

    modes: tuple[str, ...]
    """`cls`, `max`, `mean`, `mean_sqrt_len`, `weighted_mean`, `last`; joined in this order."""
    dense: tuple[DenseStage, ...] = ()
    is_normalized: bool = True
    max_length: int | None = None
    """The most tokens of a text that the authors foresaw."""

    def vector_size(self, hidden_size: int) -> int:
        """How many numbers a vector has."""
        return self.dense[-1].num_out if self.dense else hidden_size * len(self.modes)


def read_layout(directory: Path, *, default_mode: str) -> VectorLayout:
    """The layout of a folder; without modules.json `default_mode`, normalized.

    Raises: CheckpointError, UnsupportedError for a stage that is not known.
    """
    path = directory / MODULES_FILE
    if not path.is_file():
        return VectorLayout(modes=(default_mode,))
    modes: tuple[str, ...] = (default_mode,)
    dense: list[DenseStage] = []
    is_normalized = False
    for stage in _read_stages(path):
        kind = str(stage.get("type", "")).rsplit(".", 1)[-1]
        folder = directory / str(stage.get("path", ""))
        if kind == "Pooling":
            modes = _modes(read_json(folder / "config.json"), folder)
        elif kind == "Dense":
            dense.append(_dense(folder))
        elif kind == "Normalize":
            is_normalized = True
        elif kind not in ("Transformer", "Dropout"):
            raise _unknown("stage", kind, directory)
    return VectorLayout(
        modes=modes, dense=tuple(dense), is_normalized=is_normalized, max_length=_length(directory)
    )


def _read_stages(path: Path) -> list[dict[str, Any]]:
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from error
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise CheckpointError(f"{path} holds no list of stages; download it again")
    return stages


def _modes(raw: dict[str, Any], folder: Path) -> tuple[str, ...]:
    if not raw.get("include_prompt", True):
        raise _unknown("pooling", "include_prompt false", folder)
    named = raw.get("pooling_mode")
    if named is not None:
        names = [named] if isinstance(named, str) else list(named)
        unknown = [name for name in names if name not in _BY_NAME]
        if unknown:
            raise _unknown("pooling", ", ".join(map(str, unknown)), folder)
        return tuple(_BY_NAME[name] for name in names)
    modes = tuple(mode for key, mode in _MODES.items() if raw.get(key))
    if not modes:
        raise CheckpointError(f"{folder / 'config.json'} turns no pooling mode on; set one to true")
    return modes


def _dense(folder: Path) -> DenseStage:
    raw = read_json(folder / "config.json")
    try:
        return DenseStage(
            directory=folder,
            num_in=int(raw["in_features"]),
            num_out=int(raw["out_features"]),
            has_bias=bool(raw.get("bias", True)),
            activation=str(raw.get("activation_function", "Identity")).rsplit(".", 1)[-1],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}") from error


def _length(directory: Path) -> int | None:
    for name in _LENGTH_FILES:
        if (directory / name).is_file():
            length = read_json(directory / name).get("max_seq_length")
            return int(length) if length else None
    return None


def _unknown(what: str, name: str, directory: Path) -> UnsupportedError:
    reason = Reason(
        code=f"model.{what}",
        need=f"{what} {name}",
        have="Transformer, Pooling, Dense and Normalize, as they are without options",
        remedy="use a model of these, or ask for the rows with the task token_embed",
    )
    return UnsupportedError([reason], what=f"the checkpoint in {directory}")
